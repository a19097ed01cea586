"""The configuration as a whole: the shipped files, derived figures, impossible layouts."""

from pathlib import Path

import pytest

from cluster.config import Config, ConfigError
from cluster.config.reference import reference

CONFIGS = Path(__file__).parents[2] / "configs"
NAMES = ["paper", "deep10", "quickstart", "numbers"]


def problems(name: str, *overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        Config.load(CONFIGS / f"{name}.yaml", overrides)
    return list(caught.value.problems)


@pytest.mark.parametrize("name", NAMES)
def test_shipped_file_is_valid_and_survives_both_round_trips(name: str, tmp_path: Path) -> None:
    config = Config.load(CONFIGS / f"{name}.yaml")
    written = tmp_path / "resolved.yaml"
    written.write_text(config.to_yaml(), encoding="utf-8")
    assert config.name == name
    assert Config.load(written) == config
    assert Config.from_dict(config.to_dict()) == config


def test_the_documented_settings_are_those_of_the_code() -> None:
    page = CONFIGS.parent / "docs" / "configuration.md"
    assert page.read_text(encoding="utf-8") == reference(), (
        "run: baton config reference > docs/configuration.md"
    )


def test_paper_has_its_weights_and_devices() -> None:
    config = Config.load(CONFIGS / "paper.yaml")
    assert config.num_parameters == 384_000_000
    assert (config.num_layer_ranks, config.num_softmax_ranks, config.num_ranks) == (4, 4, 8)


def test_paper_trains_as_the_paper_says() -> None:
    training = Config.load(CONFIGS / "paper.yaml").training
    assert (training.batch_size, training.epochs, training.learning_rate) == (128, 7.5, 0.7)
    assert (training.halve_after_epochs, training.halve_every_epochs) == (5.0, 0.5)
    assert training.clip_norm == 5.0


def test_paper_can_be_made_small() -> None:
    small = [
        "cluster.device=cpu",
        "corpus.source_vocabulary.size=100",
        "corpus.target_vocabulary={kind: word, size: 90}",
        "model.hidden_size=8",
        "model.embedding_size=8",
    ]
    config = Config.load(CONFIGS / "paper.yaml", small)
    # Embeddings, softmax, and eight LSTM layers of four gates with input and recurrence.
    assert config.num_parameters == 8 * (100 + 90 + 90) + 8 * 4 * 8 * (8 + 8)
    assert config.num_ranks == 8


def test_ten_layers_stand_on_ten_ranks() -> None:
    config = Config.load(CONFIGS / "deep10.yaml")
    assert (config.model.num_layers, config.num_layer_ranks) == (10, 10)


def test_quickstart_and_deep10_share_their_corpus() -> None:
    one, other = (Config.load(CONFIGS / f"{name}.yaml") for name in ("quickstart", "deep10"))
    assert one.corpus == other.corpus


def test_single_placement_is_one_rank_and_ignores_the_layout_of_others() -> None:
    config = Config.load(
        CONFIGS / "quickstart.yaml", ["pipeline.placement=single", "pipeline.layer_ranks=9"]
    )
    assert config.num_ranks == 1


def test_replicas_multiply_the_devices_of_every_layout() -> None:
    config = Config.load(CONFIGS / "paper.yaml", ["pipeline.replicas=3"])
    assert (config.num_ranks, config.num_workers) == (8, 24)
    single = Config.load(
        CONFIGS / "paper.yaml", ["pipeline.replicas=16", "pipeline.placement=single"]
    )
    assert (single.num_ranks, single.num_workers) == (1, 16)
    # The largest of three shares of 128 sentences has 43.
    Config.load(CONFIGS / "paper.yaml", ["pipeline.replicas=3", "pipeline.microbatches=43"])


def test_layer_ranks_default_to_one_a_layer() -> None:
    config = Config.load(
        CONFIGS / "paper.yaml", ["model.num_layers=7", "pipeline.layer_ranks=null"]
    )
    assert config.num_layer_ranks == 7


def test_vocabularies_as_built_decide_the_networks_shape() -> None:
    shape = Config.load(CONFIGS / "numbers.yaml").model_config_for(31, 27)
    assert (shape.source_vocabulary_size, shape.target_vocabulary_size) == (31, 27)
    assert (shape.num_layers, shape.hidden_size, shape.embedding_size) == (2, 64, 64)


def test_flat_gives_every_setting_as_a_scalar() -> None:
    flat = Config.load(
        CONFIGS / "quickstart.yaml", ["corpus.train={tsv: [a, b]}", "training.batch_size=64"]
    ).flat()
    assert flat["training.batch_size"] == 64
    assert flat["corpus.train.tsv"] == "a, b"
    assert flat["checkpoint.directory"] == "runs/quickstart/checkpoints"
    assert all(value is None or isinstance(value, str | int | float) for value in flat.values())


def test_configuration_cannot_be_changed() -> None:
    config = Config.load(CONFIGS / "quickstart.yaml")
    with pytest.raises(ValueError, match="frozen"):
        config.training.batch_size = 3


def test_every_setting_is_described() -> None:
    sections = [Config, *(field.annotation for field in Config.model_fields.values())]
    for section in sections:
        for name, field in getattr(section, "model_fields", {}).items():
            assert field.description, f"{section}.{name}"


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["pipeline.layer_ranks=5"], "pipeline.layer_ranks=5 is more than model.num_layers=4"),
        (["corpus.target_vocabulary.size=3"], "softmax_ranks=4 is more than corpus.target_voc"),
        (["pipeline.microbatches=129"], "microbatches=129 is more than the training.batch_size"),
        (["pipeline.replicas=0"], "pipeline.replicas is 0; it must be at least 1"),
        (["pipeline.replicas=129"], "replicas=129 is more than the training.batch_size=128"),
        (
            ["pipeline.replicas=3", "pipeline.microbatches=44"],
            "microbatches=44 is more than the 43 sentences of a replica's share of training",
        ),
        (["corpus.max_length=2"], "time_chunks=4 is more than the 3 positions"),
        (["pipeline.microbatches=0"], "pipeline.microbatches is 0; it must be at least 1"),
        (["pipeline.softmax_ranks=0"], "pipeline.softmax_ranks is 0; it must be at least 1"),
        (["pipeline.layer_ranks=0"], "pipeline.layer_ranks is 0; it must be at least 1"),
        (["model.hidden_size=-1"], "model.hidden_size is -1; it must be at least 1"),
        (["training.learning_rate=0"], "training.learning_rate is 0; it must be greater than 0"),
        (["training.learning_rate=.nan"], "it must be a finite number"),
        (["training.clip_norm=.inf"], "it must be a finite number"),
        (["training.epochs=1e999"], "it must be a finite number"),
        (["training.batch_size=1e2"], "it must be a whole number"),
        (["training.batch_size=true"], "it must be a whole number"),
        (["training.epochs=false"], "it must be a number"),
        (["model.peepholes=no"], "model.peepholes is 'no'; it must be true or false"),
        (["name=2024"], "name is 2024; it must be text"),
        (["name=../up"], "name is '../up'"),
        (["training=3"], "training is 3; it must be a section"),
        (["training.precision=float16"], "one of 'auto', 'float32', 'bfloat16' or 'float64'"),
        (["cluster.threads_per_rank=0"], "is 0; it must be auto or a whole number from 1 to 1024"),
        (["cluster.threads_per_rank=all"], "is 'all'; it must be auto or a whole number"),
        (["cluster.threads_per_rank=true"], "is True; it must be auto or a whole number"),
        (["cluster.threads_per_rank=2000"], "is 2000; it must be auto or a whole number"),
        (["checkpoint.directory="], "checkpoint.directory is null; it must be a path"),
        (['checkpoint.directory="a\\0b"'], "it must be the path of a folder"),
        (["corpus.train={source: a}"], "corpus.train names one side only; add the files of target"),
        (["corpus.train={}"], "corpus.train names no files"),
        (["corpus.train={tsv: a, folder: b}"], "corpus.train names tsv and folder; give exactly"),
        (["corpus.train={source: [a, b], target: c}"], "names 2 source and 1 target files"),
        (["corpus.train={tsv: []}"], "it must have at least one entry"),
        (["corpus.target_vocabulary={kind: bytes, size: 9}"], "kind bytes always has 258 tokens"),
        (["corpus.target_vocabulary={kind: bpe, size: 9, language: fr}"], "only kind word uses"),
        (["corpus.source_column=target"], "they must differ"),
        (["evaluation.beam_size=1000000"], "it must be at most 1000"),
        (["tracking.uri="], "tracking.uri is null; it must be text"),
    ],
)
def test_impossible_setting_is_one_line_with_key_value_and_remedy(
    overrides: list[str], expected: str
) -> None:
    found = problems("paper", *overrides)
    assert len(found) == 1
    assert expected in found[0]
    assert "\n" not in found[0]


def test_bytes_need_no_size() -> None:
    config = Config.load(CONFIGS / "paper.yaml", ["corpus.target_vocabulary={kind: bytes}"])
    assert config.corpus.target_vocabulary.size == 258


def test_clipping_can_be_switched_off() -> None:
    assert (
        Config.load(CONFIGS / "paper.yaml", ["training.clip_norm=null"]).training.clip_norm is None
    )


def test_one_string_stands_for_a_list() -> None:
    files = Config.load(CONFIGS / "paper.yaml", ["corpus.valid={source: a, target: b}"])
    assert files.corpus.valid is not None
    assert files.corpus.valid.source == ("a",)


def test_stored_configuration_of_another_version_is_refused() -> None:
    fields = Config.load(CONFIGS / "paper.yaml").to_dict()
    fields["training"]["momentum"] = 0.9
    with pytest.raises(ConfigError, match=r"stored configuration: unknown key training\.momentum"):
        Config.from_dict(fields)


@pytest.mark.parametrize(
    ("override", "remedy"),
    [
        ("cluster.cpus_per_rank=0.33333", "steps of 0.0001: use 0.3333"),
        ("cluster.cpus_per_rank=0.00001", "at least 0.0001"),
        ("cluster.timeout_s=1e300", "at most 1000000"),
    ],
)
def test_what_ray_or_a_clock_cannot_hold_is_refused_here(override: str, remedy: str) -> None:
    [problem] = problems("quickstart", override)
    assert remedy in problem
