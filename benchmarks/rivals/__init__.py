"""The same training by other means: nn.LSTM, DistributedDataParallel, pipelining, and this project.

`python -m benchmarks.rivals` lets them train the same model on the same batches in turns, checks
that they do, measures the machine's matrix products beside them, and writes a report and a plot.
"""
