"""Reserved ids and split codes that every room shares."""

# Dense ids: 0 pads, 1 stands for everything without a training event, real ids start at 2.
UNKNOWN = 1
FIRST_ID = 2

# Codes of the `split` array.
TRAIN = 0
VALID = 1
TEST = 2
UNUSED = -1
SPLITS = {"train": TRAIN, "valid": VALID, "test": TEST}
