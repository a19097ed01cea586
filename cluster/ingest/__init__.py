"""From a prepared corpus to batches: a pure order, streamed through Ray Data."""
