"""The numbers of the training steps that are measured, the same for ours and for PyTorch's."""

RADIUS, STEP_SIZE, FAST_STEP = 8 / 255, 2 / 255, 10 / 255  # of attacks, in L-inf
NEARBY = 1e-3  # the spread of the normal noise that TRADES' attack begins at
BETA, MART_BETA = 6.0, 5.0  # of TRADES and of MART
THRESHOLD = 0.5  # of SENSE
NOISE = 2.0  # radii of noise before the step of N-FGSM
ALIGN = 0.2  # the weight of GradAlign's penalty
PATIENCE, FRIENDLY_NOISE = 1, 1e-3  # FAT's steps beyond the boundary, and the noise in each
GAMMA = 0.01  # of AWP, around PGD training
REPLAYS = 8  # of Free-AT
MIX, CONDITION = "post", 0.5  # AFD's mixing, and the one weight of its attacked images
MOMENTUM, DECAY = 0.9, 5e-4
# So small that weights hardly move while the clock runs: work should not come to depend on them.
LEARNING_RATE = 1e-4
