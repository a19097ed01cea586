"""The files that a run makes of its recorded steps."""

from cluster.timeline import PAGE, PICTURE, TRACE, TimelineRecorder
from pipeline.in_process import InProcessPipeline
from tests.batches import random_batch
from tests.pipeline.plans import small_plan


def test_the_picture_shows_the_last_recorded_step() -> None:
    plan = small_plan((2, 1), num_chunks=2)
    recorder = TimelineRecorder(plan, num_steps=2, num_steps_ahead=2)
    pipeline = InProcessPipeline(plan)
    assert recorder.files("a run") == {}
    for step in (7, 8):
        assert recorder.wants(step)
        results = pipeline.each(lambda s: s.train_step(random_batch(6), 0.1, 5.0, record=True))
        recorder.add(step, results, [""] * 3)
    files = recorder.files("a run")
    assert set(files) == {PAGE, TRACE, PICTURE}
    assert "step 8 as it ran" in files[PICTURE]
