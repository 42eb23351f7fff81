"""Models of speech and sound."""

from __future__ import annotations

from typing import Any

from bincompile.models.corpus.transformers_families import IMAGES, Family, cases_of
from bincompile.models.corpus.transformers_inputs import (
    VOCABULARY,
    floats,
    padding,
    sound,
    together,
    tokens,
)

WAVE = sound(samples=8)
ONE_LENGTH = ((2, 8), (3, 8), (1, 8))  # torch fixes the length: two bounds, or halves
LONGER = ((2, 7), (3, 11), (1, 9))


def wave_like(**settings: Any) -> dict[str, Any]:
    """The settings that models since wav2vec 2.0 share, with some of their own."""
    return {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2,
            "num_attention_heads": 4, "intermediate_size": 40, "conv_dim": [16, 16],
            "conv_kernel": [4, 2], "conv_stride": [4, 2], "num_feat_extract_layers": 2,
            "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2,
            "feat_extract_norm": "layer", "do_stable_layer_norm": True,
            "apply_spec_augment": False} | settings


def listener_like(**settings: Any) -> dict[str, Any]:
    """The settings that Whisper and its like share, with some of their own."""
    return {"vocab_size": VOCABULARY, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2,
            "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 40,
            "decoder_ffn_dim": 40, "use_cache": False, "pad_token_id": 1,
            "decoder_start_token_id": 2} | settings


FAMILIES = (
    Family("whisper", "WhisperModel",
           listener_like(num_mel_bins=8, max_source_positions=10, max_target_positions=32),
           together(floats("input_features", 8, 20), tokens("decoder_", mask=False)), 6, 3,
           unusual=("frames of a fixed number", "scale on q")),
    Family("speech_to_text", "Speech2TextModel",
           listener_like(input_feat_per_channel=8, conv_channels=16, num_conv_layers=2,
                         conv_kernel_sizes=[3, 3], max_source_positions=64,
                         max_target_positions=32),
           together(floats("input_features", -1, 8), padding("attention_mask"),
                    tokens("decoder_", mask=False)), 6, 3, variants=("eager",), sizes=LONGER,
           like="whisper"),
    Family("wav2vec2", "Wav2Vec2Model", wave_like(), WAVE, 2, sizes=LONGER),
    Family("hubert", "HubertModel", wave_like(), WAVE, 2, sizes=LONGER, like="wav2vec2"),
    Family("wavlm", "WavLMModel", wave_like(num_buckets=8, max_bucket_distance=12), WAVE, 2, 1,
           variants=("eager",), sizes=LONGER, unusual=("gated relative bias",)),
    Family("unispeech", "UniSpeechModel", wave_like(), WAVE, 2, sizes=LONGER, like="wav2vec2"),
    Family("unispeech_sat", "UniSpeechSatModel", wave_like(), WAVE, 2, sizes=LONGER,
           like="wav2vec2"),
    Family("data2vec-audio", "Data2VecAudioModel", wave_like(conv_pos_kernel_size=3), WAVE, 2,
           sizes=LONGER, like="wav2vec2"),
    Family("sew", "SEWModel", wave_like(squeeze_factor=2), WAVE, 2, sizes=ONE_LENGTH,
           like="wav2vec2"),
    Family("sew_d", "SEWDModel", wave_like(squeeze_factor=2, position_buckets=4,
                                           share_att_key=True), WAVE, 2,
           variants=("eager",), sizes=ONE_LENGTH, unusual=("disentangled terms",)),
    Family("wav2vec2_conformer", "Wav2Vec2ConformerModel",
           wave_like(position_embeddings_type="relative", max_source_positions=32), WAVE, 2,
           variants=("eager",), sizes=ONE_LENGTH, unusual=("relative terms, shifted",)),
    Family("wav2vec2_conformer-rotary", "Wav2Vec2ConformerModel",
           wave_like(position_embeddings_type="rotary"), WAVE, 2, variants=("eager",),
           sizes=ONE_LENGTH, unusual=("rope before the projection",), like="wav2vec2_conformer"),
    Family("wav2vec2_bert", "Wav2Vec2BertModel",
           {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2,
            "num_attention_heads": 4, "intermediate_size": 40, "feature_projection_input_dim": 8,
            "conv_depthwise_kernel_size": 3, "left_max_position_embeddings": 4,
            "right_max_position_embeddings": 3, "apply_spec_augment": False},
           together(floats("input_features", -1, 8), padding("attention_mask")), 2, 2,
           variants=("eager",), unusual=("relative keys",)),
    Family("audio_spectrogram_transformer", "ASTModel",
           {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
            "intermediate_size": 40, "patch_size": 4, "max_length": 12, "num_mel_bins": 8,
            "frequency_stride": 4, "time_stride": 4},
           floats("input_values", 12, 8), 2, sizes=IMAGES),
    Family("clap-audio", "ClapAudioModel",
           {"spec_size": 32, "patch_size": 4, "patch_stride": [4, 4], "num_mel_bins": 8,
            "patch_embeds_hidden_size": 8, "depths": [1, 2], "num_attention_heads": [2, 4],
            "hidden_size": 16, "window_size": 2, "num_classes": 3},
           floats("input_features", 1, 100, 8), 3, 3, variants=("eager",), sizes=IMAGES),
    Family("moonshine", "MoonshineModel",
           {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 40,
            "encoder_num_hidden_layers": 2, "decoder_num_hidden_layers": 2,
            "encoder_num_attention_heads": 4, "decoder_num_attention_heads": 4,
            "max_position_embeddings": 64, "pad_token_id": 0, "use_cache": False},
           together(floats("input_values", 1024), tokens("decoder_", mask=False)), 6, 1,
           unusual=("heads padded to a multiple",)),
    Family("speecht5", "SpeechT5ForSpeechToText",
           wave_like(encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
                     decoder_attention_heads=4, encoder_ffn_dim=40, decoder_ffn_dim=40,
                     use_cache=False, encoder_max_relative_position=3),
           together(WAVE, tokens("decoder_", mask=False)), 6, 4, variants=("eager",),
           sizes=LONGER, unusual=("relative keys",)),
    Family("parakeet", "ParakeetEncoder",
           {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
            "intermediate_size": 40, "num_mel_bins": 8, "subsampling_conv_channels": 8,
            "subsampling_factor": 4, "conv_kernel_size": 3},
           together(floats("input_features", -1, 8), padding("attention_mask")), 2,
           sizes=((2, 24), (3, 40), (1, 16)), unusual=("relative terms, shifted",),
           like="wav2vec2_conformer"),
)

CASES = cases_of(FAMILIES)
