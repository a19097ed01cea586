"""How a model's blocks are placed on ranks, scheduled, and moved.

This layer trains the same model as `model` over several ranks through a transport, inside one
process for tests or over torch.distributed, and knows nothing of Ray.
"""
