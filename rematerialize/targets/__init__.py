"""What to train, from the words of a command line: a target, example inputs, a type and a device.

`names` and `specs` read the words without torch, so that a typo is answered at once; `load` does what they say.
"""
