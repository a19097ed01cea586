"""The command profile: what operations and messages take here, for plans to count with."""

from pathlib import Path
from typing import Annotated

import typer

from cluster.commands.options import AsJson, ConfigFile, Device, Overrides, load_config
from cluster.commands.output import print_result, reserved_stdout
from model.errors import UserError


def profile(
    config_file: ConfigFile,
    overrides: Overrides = None,
    output: Annotated[Path, typer.Option(help="Costs file to write.")] = Path("costs.json"),
    device: Device = "cpu",
    source_length: Annotated[
        int, typer.Option(min=1, max=10_000, help="Positions of a batch's source side.")
    ] = 29,
    target_length: Annotated[
        int, typer.Option(min=1, max=10_000, help="Positions of a batch's target side.")
    ] = 29,
    as_json: AsJson = False,
) -> None:
    """Measure the blocks' operations and the messages between two processes, and keep the costs.

    The blocks have the configuration's sizes, its batch size and its precision (auto: what is fast
    here), and the threads of its ranks on this machine; a vocabulary is measured with part of its
    words. `baton simulate` and `baton plan` take the file as --costs.

    Example:  baton profile configs/paper.yaml --output costs.json
    """
    import sys

    import torch

    from cluster.cores import num_usable_cores
    from cluster.precision_choice import with_precision
    from cluster.rank_machine import rank_threads
    from model.process_memory import keep_freed_memory
    from pipeline.costs.file import save_costs
    from pipeline.costs.operation_costs import BatchShape
    from pipeline.costs.profiling import measure_costs, measure_link
    from pipeline.json_file import check_writable

    config = load_config(config_file, [*(overrides or ()), f"cluster.device={device}"])
    config = with_precision(config)
    sizes = config.corpus.source_vocabulary.size, config.corpus.target_vocabulary.size
    shape = BatchShape(config.training.batch_size, source_length, target_length)
    check_writable(output, "costs")
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device=cuda, but torch finds no GPU here; use --device cpu")
    shared_memory = config.cluster.shared_memory
    way = "in shared memory" if shared_memory else "over the network (gloo)"
    with reserved_stdout() as stdout:
        keep_freed_memory()
        num_cores, threads = num_usable_cores(), config.cluster.threads_per_rank
        torch.set_num_threads(rank_threads(threads, config.num_workers, num_cores))
        link = measure_link(shared_memory=shared_memory)
        costs = measure_costs(
            config.model_config_for(*sizes),
            shape,
            precision=config.training.precision,
            device=device,
            link=link,
            tell=lambda family: print(f"measuring {family}", file=sys.stderr),
        )
        save_costs(output, costs)
    print_result(
        stdout,
        as_json=as_json,
        result={
            "output": str(output),
            "one_device_s": costs.one_device_s(),
            "link_way": way,
            "link_latency_s": link.latency_s,
            "link_bytes_per_s": link.bytes_per_s,
        },
        lines=[
            f"one device needs {costs.one_device_s():.3g} s a step of {shape.num_sentences} pairs "
            f"({source_length} and {target_length} positions); {costs.origin}",
            f"link between two processes here, {way} (cluster.shared_memory): "
            f"{link.latency_s * 1e6:.0f} us, {link.bytes_per_s / 1e9:.2f} GB/s",
            f"costs are in {output}",
        ],
    )
