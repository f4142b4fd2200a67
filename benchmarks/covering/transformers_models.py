"""Tiny configurations of transformers architectures: encoders, decoders, encoder-decoders, vision, audio, pairs.

Each is built from its configuration class with random weights; nothing is downloaded. Text comes with padding of
different lengths. ``use_cache`` is off: keys and values of a training forward are outputs that nobody reads.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Generator, nn

from covering.case import Case, Inputs

_VOCABULARY, _LENGTH = 99, 12
_TEXT = {
    "vocab_size": _VOCABULARY, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4,
    "intermediate_size": 64, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_DECODER = {**_TEXT, "use_cache": False}
_SEQ2SEQ = {
    "vocab_size": _VOCABULARY, "d_model": 32, "encoder_layers": 3, "decoder_layers": 3, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "max_position_embeddings": 64,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2, "use_cache": False,
}  # fmt: skip
_T5 = {
    "vocab_size": _VOCABULARY, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 3, "num_decoder_layers": 3,
    "num_heads": 4, "decoder_start_token_id": 0, "use_cache": False,
}  # fmt: skip
_VISION = {
    "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 64, "image_size": 32,
    "patch_size": 8, "num_labels": 5,
}  # fmt: skip
_SPEECH = {
    "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 64, "vocab_size": 20,
    "conv_dim": (16, 16, 16), "conv_stride": (5, 4, 2), "conv_kernel": (10, 8, 4), "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 2, "num_feat_extract_layers": 3, "layerdrop": 0.0, "mask_time_prob": 0.0,
    "mask_feature_prob": 0.0, "apply_spec_augment": False,
}  # fmt: skip
_CLIP_TEXT = {k: v for k, v in _TEXT.items() if k != "pad_token_id"} | {"pad_token_id": 1, "eos_token_id": 98}
_CLIP = {
    "text_config": {**_CLIP_TEXT, "projection_dim": 16}, "vision_config": {**_VISION, "projection_dim": 16},
    "projection_dim": 16,
}  # fmt: skip


def _ids(batch: int, generator: Generator, length: int = _LENGTH) -> torch.Tensor:
    return torch.randint(3, _VOCABULARY - 2, (batch, length), generator=generator)


def _mask(batch: int, generator: Generator, length: int = _LENGTH) -> torch.Tensor:
    """Right padding: the first sample is whole, every other one has a length of its own."""
    lengths = torch.randint(length // 2, length + 1, (batch, 1), generator=generator)
    lengths[0] = length
    return (torch.arange(length) < lengths).long()


def text(batch: int, generator: Generator) -> dict[str, Any]:
    mask = _mask(batch, generator)
    return {"input_ids": _ids(batch, generator) * mask, "attention_mask": mask}


def ids_only(batch: int, generator: Generator) -> dict[str, Any]:
    return {"input_ids": _ids(batch, generator)}


def long_text(batch: int, generator: Generator) -> dict[str, Any]:
    return {"input_ids": _ids(batch, generator, 32), "attention_mask": _mask(batch, generator, 32)}


def clip_ids(batch: int, generator: Generator) -> torch.Tensor:
    ids = _ids(batch, generator)
    ids[:, -1] = 98  # CLIP pools at the end-of-text token
    return ids


def seq2seq(batch: int, generator: Generator) -> dict[str, Any]:
    return {**text(batch, generator), "decoder_input_ids": _ids(batch, generator, 7)}


def with_boxes(batch: int, generator: Generator) -> dict[str, Any]:
    corners = torch.randint(0, 50, (batch, _LENGTH, 2), generator=generator)
    return {**text(batch, generator), "bbox": torch.cat([corners, corners + 10], -1)}


def _images(size: int, channels: int = 3) -> Inputs:
    def make(batch: int, generator: Generator) -> dict[str, Any]:
        return {"pixel_values": torch.randn(batch, channels, size, size, generator=generator)}

    return make


def _frames(count: int, size: int) -> Inputs:
    def make(batch: int, generator: Generator) -> dict[str, Any]:
        return {"pixel_values": torch.randn(batch, count, 3, size, size, generator=generator)}

    return make


def pair(batch: int, generator: Generator) -> dict[str, Any]:
    images = torch.randn(batch, 3, 32, 32, generator=generator)
    return {"input_ids": clip_ids(batch, generator), "attention_mask": _mask(batch, generator), "pixel_values": images}


def document(batch: int, generator: Generator) -> dict[str, Any]:
    return {**with_boxes(batch, generator), "pixel_values": torch.randn(batch, 3, 32, 32, generator=generator)}


def vilt(batch: int, generator: Generator) -> dict[str, Any]:
    return {**text(batch, generator), "pixel_values": torch.randn(batch, 3, 32, 32, generator=generator)}


def waveform(batch: int, generator: Generator) -> dict[str, Any]:
    return {"input_values": torch.randn(batch, 1600, generator=generator)}


def spectrogram(batch: int, generator: Generator) -> dict[str, Any]:
    return {"input_values": torch.randn(batch, 32, 16, generator=generator)}


def whisper(batch: int, generator: Generator) -> dict[str, Any]:
    features = torch.randn(batch, 16, 60, generator=generator)
    return {"input_features": features, "decoder_input_ids": _ids(batch, generator, 7)}


def speech_to_text(batch: int, generator: Generator) -> dict[str, Any]:
    features = torch.randn(batch, 60, 16, generator=generator)
    return {"input_features": features, "decoder_input_ids": _ids(batch, generator, 7)}


def _clap(batch: int, generator: Generator) -> dict[str, Any]:
    return {**text(batch, generator), "input_features": torch.randn(batch, 1, 64, 16, generator=generator)}


# name: (model class, configuration, inputs)
_TABLE: dict[str, tuple[str, dict[str, Any], Inputs]] = {
    # encoders
    "bert": ("BertForSequenceClassification", _TEXT, text),
    "bert-mlm": ("BertForMaskedLM", _TEXT, text),
    "roberta": ("RobertaForSequenceClassification", _TEXT, text),
    "xlm-roberta": ("XLMRobertaForTokenClassification", _TEXT, text),
    "distilbert": ("DistilBertForSequenceClassification", {
        "vocab_size": 99, "dim": 32, "n_layers": 4, "n_heads": 4, "hidden_dim": 64, "max_position_embeddings": 64,
    }, text),
    "albert": ("AlbertForSequenceClassification", {**_TEXT, "embedding_size": 16}, text),
    "electra": ("ElectraForSequenceClassification", {**_TEXT, "embedding_size": 16}, text),
    "deberta": ("DebertaForSequenceClassification", {
        **_TEXT, "relative_attention": True, "pos_att_type": ["c2p", "p2c"],
    }, text),
    "deberta-v2": ("DebertaV2ForSequenceClassification", {
        **_TEXT, "relative_attention": True, "pos_att_type": ["c2p", "p2c"],
    }, text),
    "mpnet": ("MPNetForSequenceClassification", _TEXT, text),
    "convbert": ("ConvBertForSequenceClassification", {**_TEXT, "embedding_size": 16}, text),
    "mobilebert": ("MobileBertForSequenceClassification", {
        **_TEXT, "embedding_size": 32, "intra_bottleneck_size": 32, "true_hidden_size": 32,
    }, text),
    "squeezebert": ("SqueezeBertForSequenceClassification", {**_TEXT, "embedding_size": 32}, text),
    "fnet": ("FNetForSequenceClassification", _TEXT, ids_only),
    "ibert": ("IBertForSequenceClassification", _TEXT, text),
    "roformer": ("RoFormerForSequenceClassification", {**_TEXT, "embedding_size": 32}, text),
    "rembert": ("RemBertForSequenceClassification", {
        **_TEXT, "input_embedding_size": 16, "output_embedding_size": 16,
    }, text),
    "megatron-bert": ("MegatronBertForSequenceClassification", _TEXT, text),
    "ernie": ("ErnieForSequenceClassification", _TEXT, text),
    "nystromformer": ("NystromformerForSequenceClassification", {
        **_TEXT, "num_landmarks": _LENGTH, "segment_means_seq_len": _LENGTH,
    }, text),
    "modernbert": ("ModernBertForSequenceClassification", {**_TEXT, "local_attention": 8}, text),
    "longformer": ("LongformerForSequenceClassification", {
        **_TEXT, "attention_window": 8, "max_position_embeddings": 80,
    }, long_text),
    "big-bird": ("BigBirdForSequenceClassification", {**_TEXT, "attention_type": "original_full"}, text),
    "funnel": ("FunnelForSequenceClassification", {
        "vocab_size": 99, "block_sizes": [1, 2, 2], "num_decoder_layers": 1, "d_model": 32, "n_head": 4, "d_head": 8,
        "d_inner": 64,
    }, text),
    "xlnet": ("XLNetForSequenceClassification", {
        "vocab_size": 99, "d_model": 32, "n_layer": 4, "n_head": 4, "d_inner": 64,
    }, text),
    "esm": ("EsmForSequenceClassification", {
        **_TEXT, "position_embedding_type": "rotary", "mask_token_id": 4, "token_dropout": False,
    }, text),
    "canine": ("CanineForSequenceClassification", {
        **_TEXT, "num_hash_buckets": 64, "downsampling_rate": 2, "local_transformer_stride": 4,
        "max_position_embeddings": 64,
    }, long_text),
    "layoutlm": ("LayoutLMForTokenClassification", {**_TEXT, "max_2d_position_embeddings": 128}, with_boxes),
    # decoders
    "gpt2": ("GPT2LMHeadModel", {
        "vocab_size": 99, "n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 64, "use_cache": False,
    }, text),
    "gptj": ("GPTJForCausalLM", {
        "vocab_size": 99, "n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 64, "rotary_dim": 4,
        "use_cache": False,
    }, text),
    "gpt-neo": ("GPTNeoForCausalLM", {
        "vocab_size": 99, "hidden_size": 32, "num_layers": 4, "num_heads": 4,
        "attention_types": [[["global", "local"], 2]], "intermediate_size": 64, "max_position_embeddings": 64,
        "window_size": 7, "use_cache": False,
    }, text),
    "gpt-neox": ("GPTNeoXForCausalLM", _DECODER, text),
    "codegen": ("CodeGenForCausalLM", {
        "vocab_size": 99, "n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 64, "rotary_dim": 4,
        "use_cache": False,
    }, text),
    "openai-gpt": ("OpenAIGPTLMHeadModel", {
        "vocab_size": 99, "n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 64,
    }, text),
    "opt": ("OPTForCausalLM", {**_DECODER, "ffn_dim": 64, "word_embed_proj_dim": 32}, text),
    "bloom": ("BloomForCausalLM", {
        "vocab_size": 99, "hidden_size": 32, "n_layer": 4, "n_head": 4, "use_cache": False,
    }, text),
    "mpt": ("MptForCausalLM", {
        "vocab_size": 99, "d_model": 32, "n_layers": 4, "n_heads": 4, "max_seq_len": 64, "use_cache": False,
    }, text),
    "falcon": ("FalconForCausalLM", {
        "vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "use_cache": False,
    }, text),
    "llama": ("LlamaForCausalLM", {**_DECODER, "num_key_value_heads": 2}, text),
    "mistral": ("MistralForCausalLM", {**_DECODER, "num_key_value_heads": 2, "sliding_window": 8}, text),
    "mixtral": ("MixtralForCausalLM", {**_DECODER, "num_key_value_heads": 2, "num_local_experts": 4}, text),
    "qwen2": ("Qwen2ForCausalLM", {**_DECODER, "num_key_value_heads": 2}, text),
    "qwen3": ("Qwen3ForCausalLM", {**_DECODER, "num_key_value_heads": 2, "head_dim": 8}, text),
    "gemma": ("GemmaForCausalLM", {**_DECODER, "num_key_value_heads": 2, "head_dim": 8}, text),
    "gemma2": ("Gemma2ForCausalLM", {**_DECODER, "num_key_value_heads": 2, "head_dim": 8, "sliding_window": 8}, text),
    "phi": ("PhiForCausalLM", _DECODER, text),
    "phi3": ("Phi3ForCausalLM", {**_DECODER, "num_key_value_heads": 2}, text),
    "stablelm": ("StableLmForCausalLM", {**_DECODER, "num_key_value_heads": 4}, text),
    "starcoder2": ("Starcoder2ForCausalLM", {**_DECODER, "num_key_value_heads": 2}, text),
    "olmo": ("OlmoForCausalLM", _DECODER, text),
    "olmo2": ("Olmo2ForCausalLM", _DECODER, text),
    "cohere": ("CohereForCausalLM", _DECODER, text),
    "granite": ("GraniteForCausalLM", _DECODER, text),
    "smollm3": ("SmolLM3ForCausalLM", {**_DECODER, "num_key_value_heads": 2}, text),
    "persimmon": ("PersimmonForCausalLM", _DECODER, text),
    "xglm": ("XGLMForCausalLM", {
        "vocab_size": 99, "d_model": 32, "ffn_dim": 64, "num_layers": 4, "attention_heads": 4,
        "max_position_embeddings": 64, "use_cache": False,
    }, text),
    "biogpt": ("BioGptForCausalLM", _DECODER, text),
    "ctrl": ("CTRLLMHeadModel", {
        "vocab_size": 99, "n_positions": 64, "n_embd": 32, "dff": 64, "n_layer": 4, "n_head": 4, "use_cache": False,
    }, text),
    "mamba": ("MambaForCausalLM", {
        "vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 4, "state_size": 8, "use_cache": False,
    }, ids_only),
    # encoder-decoders
    "t5": ("T5ForConditionalGeneration", _T5, seq2seq),
    "umt5": ("UMT5ForConditionalGeneration", _T5, seq2seq),
    "bart": ("BartForConditionalGeneration", _SEQ2SEQ, seq2seq),
    "mbart": ("MBartForConditionalGeneration", _SEQ2SEQ, seq2seq),
    "pegasus": ("PegasusForConditionalGeneration", _SEQ2SEQ, seq2seq),
    "marian": ("MarianMTModel", _SEQ2SEQ, seq2seq),
    "blenderbot": ("BlenderbotForConditionalGeneration", _SEQ2SEQ, seq2seq),
    "m2m-100": ("M2M100ForConditionalGeneration", {
        **_SEQ2SEQ, "encoder_layerdrop": 0.0, "decoder_layerdrop": 0.0,
    }, seq2seq),
    "led": ("LEDForConditionalGeneration", {
        **{k: v for k, v in _SEQ2SEQ.items() if k != "max_position_embeddings"},
        "max_encoder_position_embeddings": 64, "max_decoder_position_embeddings": 64, "attention_window": 4,
    }, seq2seq),
    "prophetnet": ("ProphetNetForConditionalGeneration", {
        "vocab_size": 99, "hidden_size": 32, "num_encoder_layers": 3, "num_decoder_layers": 3,
        "num_encoder_attention_heads": 4, "num_decoder_attention_heads": 4, "encoder_ffn_dim": 64,
        "decoder_ffn_dim": 64, "max_position_embeddings": 64, "use_cache": False,
    }, seq2seq),
    "whisper": ("WhisperForConditionalGeneration", {
        **{k: v for k, v in _SEQ2SEQ.items() if k != "max_position_embeddings"}, "num_mel_bins": 16,
        "max_source_positions": 30, "max_target_positions": 32,
    }, whisper),
    "speech-to-text": ("Speech2TextForConditionalGeneration", {
        **{k: v for k, v in _SEQ2SEQ.items() if k != "max_position_embeddings"}, "input_feat_per_channel": 16,
        "conv_channels": 32, "max_source_positions": 64, "max_target_positions": 32, "encoder_layerdrop": 0.0,
        "decoder_layerdrop": 0.0,
    }, speech_to_text),
    # vision
    "vit": ("ViTForImageClassification", _VISION, _images(32)),
    "deit": ("DeiTForImageClassification", _VISION, _images(32)),
    "beit": ("BeitForImageClassification", _VISION, _images(32)),
    "data2vec-vision": ("Data2VecVisionForImageClassification", _VISION, _images(32)),
    "dinov2": ("Dinov2ForImageClassification", _VISION, _images(32)),
    "vit-msn": ("ViTMSNForImageClassification", _VISION, _images(32)),
    "yolos": ("YolosForObjectDetection", {**_VISION, "image_size": [32, 32], "num_detection_tokens": 5}, _images(32)),
    "vit-mae": ("ViTMAEForPreTraining", {
        **_VISION, "decoder_hidden_size": 32, "decoder_num_hidden_layers": 2, "decoder_num_attention_heads": 4,
        "decoder_intermediate_size": 64,
    }, _images(32)),
    "swin": ("SwinForImageClassification", {
        "image_size": 32, "patch_size": 2, "embed_dim": 16, "depths": [1, 2, 1], "num_heads": [2, 2, 4],
        "window_size": 4, "num_labels": 5,
    }, _images(32)),
    "swinv2": ("Swinv2ForImageClassification", {
        "image_size": 32, "patch_size": 2, "embed_dim": 16, "depths": [1, 2, 1], "num_heads": [2, 2, 4],
        "window_size": 4, "num_labels": 5,
    }, _images(32)),
    "convnext": ("ConvNextForImageClassification", {
        "hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 2, 1], "num_labels": 5,
    }, _images(64)),
    "convnextv2": ("ConvNextV2ForImageClassification", {
        "hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 2, 1], "num_labels": 5,
    }, _images(64)),
    "segformer": ("SegformerForSemanticSegmentation", {
        "hidden_sizes": [16, 16, 32, 32], "num_attention_heads": [1, 2, 2, 2], "depths": [1, 1, 1, 1],
        "decoder_hidden_size": 16, "num_labels": 5,
    }, _images(64)),
    "mobilevit": ("MobileViTForImageClassification", {
        "image_size": 64, "hidden_sizes": [16, 24, 32], "neck_hidden_sizes": [8, 8, 16, 16, 24, 24, 32],
        "num_labels": 5,
    }, _images(64)),
    "resnet": ("ResNetForImageClassification", {
        "embedding_size": 8, "hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 2, 1], "layer_type": "basic",
        "num_labels": 5,
    }, _images(64)),
    "regnet": ("RegNetForImageClassification", {
        "embedding_size": 8, "hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 2, 1], "groups_width": 8,
        "num_labels": 5,
    }, _images(64)),
    "pvt": ("PvtForImageClassification", {
        "image_size": 64, "hidden_sizes": [16, 16, 32, 32], "depths": [1, 1, 1, 1],
        "num_attention_heads": [1, 2, 2, 2], "num_labels": 5,
    }, _images(64)),
    "poolformer": ("PoolFormerForImageClassification", {
        "hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 2, 1], "num_labels": 5,
    }, _images(64)),
    "cvt": ("CvtForImageClassification", {
        "embed_dim": [16, 32, 32], "num_heads": [1, 2, 2], "depth": [1, 2, 3], "num_labels": 5,
    }, _images(64)),
    "levit": ("LevitForImageClassification", {
        "image_size": 64, "hidden_sizes": [16, 32, 48], "num_attention_heads": [2, 2, 2], "depths": [1, 1, 1],
        "key_dim": [8, 8, 8], "num_labels": 5,
    }, _images(64)),
    "focalnet": ("FocalNetForImageClassification", {
        "image_size": 32, "patch_size": 2, "embed_dim": 16, "depths": [1, 2, 1], "hidden_sizes": [16, 32, 64],
        "focal_levels": [2, 2, 2], "focal_windows": [3, 3, 3], "num_labels": 5,
    }, _images(32)),
    "efficientnet": ("EfficientNetForImageClassification", {
        "image_size": 64, "width_coefficient": 0.25, "depth_coefficient": 0.5, "hidden_dim": 320, "num_labels": 5,
    }, _images(64)),
    "mobilenet-v2": ("MobileNetV2ForImageClassification", {
        "image_size": 64, "depth_multiplier": 0.25, "num_labels": 5,
    }, _images(64)),
    "dpt": ("DPTForSemanticSegmentation", {
        **_VISION, "backbone_out_indices": [0, 1, 2, 3], "neck_hidden_sizes": [8, 8, 16, 16],
        "fusion_hidden_size": 16, "is_hybrid": False,
    }, _images(32)),
    "videomae": ("VideoMAEForVideoClassification", {**_VISION, "num_frames": 4, "tubelet_size": 2}, _frames(4, 32)),
    "timesformer": ("TimesformerForVideoClassification", {**_VISION, "num_frames": 2}, _frames(2, 32)),
    # audio
    "wav2vec2": ("Wav2Vec2ForCTC", _SPEECH, waveform),
    "wav2vec2-classification": ("Wav2Vec2ForSequenceClassification", _SPEECH, waveform),
    "hubert": ("HubertForCTC", _SPEECH, waveform),
    "wavlm": ("WavLMForCTC", _SPEECH, waveform),
    "unispeech": ("UniSpeechForCTC", _SPEECH, waveform),
    "sew": ("SEWForCTC", {**_SPEECH, "squeeze_factor": 2}, waveform),
    "data2vec-audio": ("Data2VecAudioForCTC", {
        **_SPEECH, "num_conv_pos_embeddings": 3, "conv_pos_kernel_size": 3,
    }, waveform),
    "wav2vec2-conformer": ("Wav2Vec2ConformerForCTC", _SPEECH, waveform),
    "ast": ("ASTForAudioClassification", {
        **{k: v for k, v in _VISION.items() if k != "image_size"}, "max_length": 32, "num_mel_bins": 16,
        "frequency_stride": 8, "time_stride": 8,
    }, spectrogram),
    # pairs of modalities
    "clip": ("CLIPModel", _CLIP, pair),
    "clip-vision": ("CLIPForImageClassification", {**_CLIP, "num_labels": 5}, _images(32)),
    "siglip": ("SiglipModel", {"text_config": {**_CLIP_TEXT, "projection_size": 32}, "vision_config": _VISION}, pair),
    "chinese-clip": ("ChineseCLIPModel", {**_CLIP, "text_config": _TEXT}, pair),
    "blip": ("BlipForImageTextRetrieval", {
        "text_config": {**_TEXT, "encoder_hidden_size": 32, "projection_dim": 16},
        "vision_config": {**_VISION, "projection_dim": 16}, "projection_dim": 16, "image_text_hidden_size": 16,
    }, pair),
    "vilt": ("ViltForQuestionAnswering", {**_VISION, **_TEXT, "max_image_length": -1, "num_labels": 5}, vilt),
    "git": ("GitForCausalLM", {**_DECODER, "vision_config": _VISION}, vilt),
    "layoutlmv3": ("LayoutLMv3ForTokenClassification", {
        **_TEXT, "input_size": 32, "patch_size": 8, "max_2d_position_embeddings": 128, "coordinate_size": 6,
        "shape_size": 4, "num_labels": 5,
    }, document),
    "clap": ("ClapModel", {
        "text_config": {**_TEXT, "projection_dim": 16},
        "audio_config": {
            "spec_size": 64, "num_mel_bins": 16, "hidden_size": 32, "patch_embeds_hidden_size": 16, "depths": [1, 1],
            "num_attention_heads": [2, 2], "window_size": 4, "patch_size": 4, "patch_stride": [4, 4],
            "projection_dim": 16, "num_hidden_layers": 2,
        },
        "projection_dim": 16,
    }, _clap),
}  # fmt: skip


def _build(class_name: str, settings: dict[str, Any]) -> nn.Module:
    import transformers

    kind = getattr(transformers, class_name)
    return kind(kind.config_class(**settings))


def cases() -> Iterator[Case]:
    """All of them, in the order of the table."""
    for name, (class_name, settings, inputs) in _TABLE.items():
        yield Case("transformers", name, partial(_build, class_name, settings), inputs)


# An attention mask that is all ones is skipped by the models: what an example without padding does not show, rows of
# a padded batch need all the same.
_MASKED = ("bert", "distilbert", "electra", "gpt2", "llama", "mistral", "opt", "t5", "bart", "clip")
_EXAMPLES: dict[str, tuple[int, ...]] = {"no sample is padded": (1, 1, 1), "only the last sample is padded": (1, 1, 0)}


def _with_lengths(whole: tuple[int, ...], inputs: Inputs, batch: int, generator: Generator) -> dict[str, Any]:
    given = inputs(batch, generator)
    mask = torch.ones_like(given["attention_mask"])
    for sample in range(batch):
        if not whole[sample % len(whole)]:
            mask[sample, mask.shape[1] // 2 :] = 0
    return {**given, "attention_mask": mask}


def mask_cases() -> Iterator[Case]:
    """Text models that are split on an example with less padding than what comes later."""
    for name in _MASKED:
        class_name, settings, inputs = _TABLE[name]
        for note, whole in _EXAMPLES.items():
            example = partial(_with_lengths, whole, inputs)
            yield Case("masks", f"{name}: {note}", partial(_build, class_name, settings), inputs, note, example)
