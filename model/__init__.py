"""The mathematics and the text: trains and translates on one device.

This layer knows nothing of stages, transports or Ray. Its trainer is the oracle that every other
layer must reproduce.
"""
