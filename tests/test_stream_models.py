"""The models that are made for streams: what they hear and see, and that they stream exactly."""

from __future__ import annotations

import wave
from pathlib import Path

import numpy as np
import pytest
import torch
from formulas import array
from torch import nn

import bincompile as bc
from bincompile.models import action_stream, audio_stream, train_audio


@pytest.fixture(scope="module")
def listener() -> nn.Module:
    return audio_stream.build()


# audio_stream


def test_audio_accuracy_and_size(listener: nn.Module) -> None:
    figures = audio_stream.evaluate(listener)
    assert figures["accuracy"] >= 0.97 and figures["moving_accuracy"] >= 0.94
    assert audio_stream.WEIGHTS.stat().st_size < 200_000
    _, labels = audio_stream.held_out()
    assert torch.bincount(labels.flatten(), minlength=4).min() > 500


def test_rising_is_read_from_what_was_heard_before(listener: nn.Module) -> None:
    """The same second tone after a lower and after a higher first one, and after neither."""
    seconds = torch.arange(16000) / 16000
    answers = []
    for first in (500.0, 2000.0, None):
        sound = 0.01 * torch.randn(16000)
        if first is not None:
            sound[4800:6400] += 0.3 * torch.sin(2 * torch.pi * first * seconds[:1600])
        sound[8000:9600] += 0.3 * torch.sin(2 * torch.pi * 1000 * seconds[:1600])
        found = listener(audio_stream.frames(sound)[None])[0].argmax(-1)
        answers.append(found[52:58].mode().values.item())
        assert found[:28].eq(0).all() and found[85:].eq(0).all()
    assert [audio_stream.CLASSES[a] for a in answers] == ["rising", "falling", "tone"]


def test_frames_are_log_energies_of_mel_bands() -> None:
    sound, _ = audio_stream.synthesise(0.2, seed=1)
    found = array(audio_stream.frames(sound))
    samples = np.concatenate([np.zeros(240), array(sound)])
    hertz = np.arange(257) * 8000 / 256
    ends = 1127 * np.log1p(np.array([60.0, 7600.0]) / 700)
    centres = 700 * np.expm1(np.linspace(*ends, 42) / 1127)
    hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(400) / 400)
    for t in range(20):
        power = np.abs(np.fft.rfft(samples[160 * t:160 * t + 400] * hann, 512)) ** 2 / 200
        bands = [np.interp(hertz, centres[i:i + 3], [0, 1, 0], 0, 0) @ power for i in range(40)]
        np.testing.assert_allclose(found[t], (np.log(np.array(bands) + 1e-6) + 5.5) / 1.5,
                                   atol=1e-3)


def test_a_frame_needs_no_later_sample() -> None:
    sound, _ = audio_stream.synthesise(0.5, seed=2)
    whole = audio_stream.frames(sound)
    assert torch.equal(audio_stream.frames(sound[:160 * 31 + 99]), whole[:31])
    assert audio_stream.frames(sound[:4800].view(2, -1)).shape == (2, 15, 40)
    with pytest.raises(bc.InputError, match="159 samples"):
        audio_stream.frames(sound[:159])


def test_sounds_repeat_and_their_classes_follow_the_pitch() -> None:
    first, second = (audio_stream.synthesise(1.0, seed=3) for _ in range(2))
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])
    assert first[0].shape == (16000,) and first[1].shape == (100,)
    assert not torch.equal(first[0], audio_stream.synthesise(1.0, seed=4)[0])
    sound, labels = audio_stream.synthesise(20.0, seed=5)
    runs = [r for r in torch.tensor_split(torch.arange(2000), labels.diff().nonzero()[:, 0] + 1)
            if labels[r[0]] and len(r) >= 5]
    pitches = [torch.fft.rfft(sound[160 * int(r[0]) + 80:160 * int(r[0]) + 720], 4096)
               .abs().argmax().item() for r in runs]
    kinds = [int(labels[r[0]]) for r in runs]
    moves = [(kind, new > old) for kind, new, old in
             zip(kinds[1:], pitches[1:], pitches, strict=False) if kind >= 2]
    assert len(moves) > 10 and all(up == (kind == 2) for kind, up in moves)


@pytest.mark.parametrize("channels", [1, 2])
def test_a_wav_file_is_read_as_it_was_written(tmp_path: Path, channels: int) -> None:
    samples = np.random.default_rng(0).integers(-32768, 32767, (1000, channels), dtype=np.int16)
    path = tmp_path / "sound.wav"
    write(path, samples)
    np.testing.assert_allclose(array(audio_stream.read(path)), samples.mean(1) / 32768, atol=1e-6)


def write(path: Path, samples: np.ndarray, rate: int = 16000, width: int = 2) -> None:
    with wave.open(str(path), "wb") as file:
        file.setnchannels(samples.shape[1])
        file.setsampwidth(width)
        file.setframerate(rate)
        file.writeframes(samples.tobytes())


def test_what_is_no_such_sound_is_refused_by_name(tmp_path: Path) -> None:
    path, samples = tmp_path / "sound.wav", np.zeros((8, 1), np.int16)
    for form in ({"rate": 8000}, {"width": 1}):
        write(path, samples, **form)
        with pytest.raises(bc.InputError, match=r"sound\.wav has"):
            audio_stream.read(path)
    path.write_text("no sound")
    for wrong in (path, tmp_path / "nothing.wav"):
        with pytest.raises(bc.ConfigError, match=wrong.name):
            audio_stream.read(wrong)


def test_the_model_looks_back_and_no_further_than_it_says() -> None:
    model = audio_stream.AudioStream(width=16, heads=2, layers=2, window=4).eval().double()
    x = torch.randn(1, 30, 40, dtype=torch.float64)
    y = model(x)
    for t, changed in ((12, range(12, 12 + 4 + 6 + 1)), (0, range(0, 11))):
        other = x.clone()
        other[:, t] += 1
        moved = (model(other) - y)[0].abs().amax(-1) > 1e-12
        assert moved.nonzero()[:, 0].tolist() == list(changed)


def test_audio_training_lowers_the_loss_and_is_repeatable() -> None:
    (model, losses), (other, _) = (train_audio.train(4, seed=0) for _ in range(2))
    assert losses[-1] < losses[0] and not model.training
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(),
                                                 strict=True))
    heard, labels = train_audio.batch(0)
    assert heard.shape == (16, 200, 40) and labels.shape == (16, 200)


# action_stream


@pytest.mark.parametrize("blocks", [1, 2])
def test_action_model_computes_what_is_written_here(blocks: int) -> None:
    """nn.TransformerEncoder in float64 numpy, from its parameters alone."""
    model = small(blocks)
    x = torch.randn(2, 5, 24, dtype=torch.float64)
    w = {name: array(tensor) for name, tensor in model.state_dict().items()}

    def linear(name: str, y: np.ndarray) -> np.ndarray:
        return y @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def norm(name: str, y: np.ndarray) -> np.ndarray:
        centred = y - y.mean(-1, keepdims=True)
        return centred / np.sqrt(y.var(-1, keepdims=True) + 1e-5) * w[f"{name}.weight"] \
            + w[f"{name}.bias"]

    y = linear("embed", array(x)) + w["positions.weight"][:5]
    for layer in (f"encoder.layers.{i}" for i in range(blocks)):
        joined = y @ w[f"{layer}.self_attn.in_proj_weight"].T + w[f"{layer}.self_attn.in_proj_bias"]
        q, k, v = (part.reshape(2, 5, 4, 4).swapaxes(1, 2) for part in np.split(joined, 3, -1))
        weights = np.exp(q @ k.swapaxes(2, 3) / 2)
        mixed = (weights / weights.sum(-1, keepdims=True) @ v).swapaxes(1, 2).reshape(y.shape)
        y = norm(f"{layer}.norm1", y + linear(f"{layer}.self_attn.out_proj", mixed))
        inner = np.maximum(linear(f"{layer}.linear1", y), 0)
        y = norm(f"{layer}.norm2", y + linear(f"{layer}.linear2", inner))
    np.testing.assert_allclose(array(model(x)), linear("head", y[:, -1]), atol=1e-12)


def small(blocks: int, dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(blocks)
    return action_stream.ActionStream(24, 16, 4, blocks, window=6).eval().to(dtype)


def test_action_model_has_the_shape_of_the_paper() -> None:
    model = action_stream.build()
    assert (model.embed.in_features, model.embed.out_features) == (3072, 1024)
    assert model.positions.weight.shape == (127, 1024)
    layer = model.encoder.layers[0]
    assert (layer.self_attn.num_heads, layer.linear1.out_features) == (8, 1024)
    assert len(action_stream.build(blocks=2, width=64, features=32).encoder.layers) == 2
    assert len(model.encoder.layers) == 1 and model.head.out_features == 22
    again = action_stream.build()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(),
                                                 strict=True))


# as streams


@pytest.mark.slow
def test_a_listener_of_every_other_frame_streams_exactly() -> None:
    """A strided front: a decision every two steps, equal to the whole model's."""
    torch.manual_seed(0)
    model = audio_stream.AudioStream(width=16, heads=2, layers=1, window=8, stride=2).eval()
    heard = audio_stream.frames(audio_stream.synthesise(0.5)[0])[None]
    compiled = bc.optimize(model, (heard,), continual=bc.Continual())
    stream = compiled.stream(1)
    answers = [stream.step(frame) for frame in heard.unbind(1)]
    assert [y is None for y in answers] == [t % 2 == 1 for t in range(50)]
    found = torch.stack([y for y in answers if y is not None], 1)
    torch.testing.assert_close(found, model(heard), atol=1e-5, rtol=0)
    assert (stream.rate, stream.delay) == (2, 0)
    assert compiled.steps is not None and compiled.steps.semantics == "banded(8)"
    assert stream.receptive_field == 2 * (8 - 1) + 4 + 1


@pytest.mark.slow
def test_a_sound_is_listened_to_frame_by_frame(
        listener: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str]) -> None:
    sound, _ = audio_stream.synthesise(1.5, seed=8)
    samples = (sound.numpy() * 32767).clip(-32768, 32767).astype(np.int16)
    write(tmp_path / "sound.wav", samples[:, None])
    monkeypatch.setattr("sys.argv", ["audio_stream", str(tmp_path / "sound.wav")])
    audio_stream.main()
    whole = listener(audio_stream.frames(audio_stream.read(tmp_path / "sound.wav"))[None])
    lines = capsys.readouterr().out.splitlines()
    assert lines == audio_stream.spoken(whole[0].argmax(-1).tolist()) and len(lines) > 1


@pytest.mark.slow
@pytest.mark.parametrize("blocks", [1, 2])
def test_an_action_model_streams_as_its_window_does(blocks: int) -> None:
    """On the first window and on each that begins where the positions do."""
    model = action_stream.ActionStream(24, 16, 4, blocks, window=8).eval()
    x = torch.randn(3, 8 + 2 * 15, 24)
    stream = bc.optimize(model, (x[:, :8],), continual=bc.Continual(
        8, positions="recycle")).stream(3)
    answers = [stream.step(frame) for frame in x.unbind(1)]
    assert all(y is None for y in answers[:7])
    for start in (0, 15, 30):
        wanted = model(x[:, start:start + 8])
        torch.testing.assert_close(answers[start + 7], wanted, atol=1e-5, rtol=0)
