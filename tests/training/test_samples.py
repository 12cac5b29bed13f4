from gt_jax.training.samples import Samples


def test_samples_after_the_checkpoint_are_cut(tmp_path):
    samples = Samples(tmp_path, start=0)
    for step in (10, 20, 30):
        samples.write(step, f"text of {step}\nafter 99 steps")
    before = (tmp_path / "samples.txt").read_text()
    again = Samples(tmp_path, start=20)
    assert again.last == 20
    again.write(30, "text of 30\nafter 99 steps")
    assert (tmp_path / "samples.txt").read_text() == before


def test_text_without_bytes_in_utf8_is_escaped(tmp_path):
    Samples(tmp_path, start=0).write(1, "a\ud800b")
    assert "a\\ud800b" in (tmp_path / "samples.txt").read_text("utf-8")
