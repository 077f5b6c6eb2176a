"""The edge: names in a config become calls, runs write files, and mistakes are met in one line."""
