"""The numbers of the training steps that are measured, the same for ours and for PyTorch's."""

RADIUS, STEP_SIZE, FAST_STEP = 8 / 255, 2 / 255, 10 / 255  # of attacks, in L-inf
NEARBY = 1e-3  # the spread of the normal noise that TRADES' attack begins at
BETA = 6.0  # of TRADES
THRESHOLD = 0.5  # of SENSE
MOMENTUM, DECAY = 0.9, 5e-4
# So small that weights hardly move while the clock runs: work should not come to depend on them.
LEARNING_RATE = 1e-4
