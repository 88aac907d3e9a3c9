"""Settings that the shrinking by names cannot know of a type: benchmark input, with the reason where it is odd."""

from __future__ import annotations

from typing import Any

from transformers import (
    BertConfig,
    EncoderDecoderConfig,
    PretrainedConfig,
    SpeechEncoderDecoderConfig,
    Wav2Vec2Config,
)

from model_coverage.shrink import tiny_config

_LATENT = {"head_dim": 4, "num_key_value_heads": 4}
_BLT_PART = {"vocab_size": 100, "num_hidden_layers": 1}
_SWIN = {"embed_dim": 16, "depths": [2, 1], "num_heads": [2, 4], "window_size": 4, "patch_size": 2}
_CONVNEXT = {"hidden_sizes": [8, 16, 24, 32], "depths": [1] * 4, "patch_size": 4}
_PYRAMID = {"hidden_sizes": [8, 16, 24, 32], "num_attention_heads": [1, 2, 2, 4], "depths": [1] * 4}
_WAVES = {
    "conv_dim": (16, 16), "conv_stride": (5, 2), "conv_kernel": (10, 3), "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2, "num_feat_extract_layers": 2,
}  # fmt: skip
_NEMOTRON_H = {
    "mamba_num_heads": 4, "mamba_head_dim": 16, "n_groups": 2, "ssm_state_size": 8, "chunk_size": 8,
    "moe_shared_expert_intermediate_size": 24,
}  # fmt: skip
# its top is 1280 channels times the width
_EFFICIENTNET = {"width_coefficient": 0.05, "depth_coefficient": 0.3, "hidden_dim": 64, "image_size": 64}

_WAVEFORM = {"num_filters": 4, "downsampling_ratios": [2, 4], "depths": [1, 1, 1]}  # of VibeVoice's tokenizers

# Task, model type, or "task:model type" -> arguments of the config; a mapping under a sub-config's name goes into it.
OVERRIDES: dict[str, dict[str, Any]] = {
    "causal-lm": {"is_decoder": True},  # without it BERT and its kin look at later tokens, too
    "bamba": {"attn_layer_indices": [1]},  # without an attention layer it cannot decode
    "blt": {
        "encoder_hash_byte_group_size": [2, 3], "encoder_hash_byte_group_vocab": 64, "patch_in_forward": False,
        "encoder_config": {**_BLT_PART, "hidden_size_global": 64}, "global_config": {"hidden_size": 64},
        "decoder_config": {**_BLT_PART, "hidden_size_global": 64}, "patcher_config": {},
    },
    # its rotary tables are for each kind of layer, which its default config leaves out
    "cohere_compass_text": {"rope_parameters": {
        "full_attention": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]},
    }},
    "cpmant": {"prompt_types": 4, "prompt_length": 4, "segment_types": 4, "position_bias_num_buckets": 16},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 56, "moe_num_experts": 4, "moe_top_k": 2},
    },
    # latent attention: as many KV heads as heads, and head_dim is the rotary part of a head
    **dict.fromkeys(("deepseek_v2", "deepseek_v3", "longcat_flash", "axk1", "axk2", "deepseek_v32", "glm4_moe_lite",
                     "glm_moe_dsa", "minicpm3", "youtu", "bailing_hybrid", "kimi_linear"), _LATENT),
    # layers once, several times, once; the last part's kinds of attention are those of the first
    "dory": {
        "num_hidden_layers": 4, "n_input_layers": 1, "n_output_layers": 1, "initializer_range": 1.0,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    },
    "dots3_note_text": {"num_key_value_heads": 4}, "dots3_note": {"text_config": {"num_key_value_heads": 4}},
    # the first layers write the keys that the last ones read
    "gemma3n_text": {
        "num_hidden_layers": 4, "num_kv_shared_layers": 2, "activation_sparsity_pattern": [0.5, 0.0, 0.0, 0.0],
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    },
    "esmc": {"num_key_value_heads": 4},
    "got_ocr2": {"vision_config": {"output_channels": 16, "global_attn_indexes": [0], "window_size": 2}},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 6},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    # an attention layer and a Mamba layer, with and without experts
    "jamba": {
        "use_mamba_kernels": False, "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_offset": 0,
    },
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "mamba2": {"num_heads": 8, "n_groups": 2, "chunk_size": 8},
    "mllama_text_model": {
        "cross_attention_layers": [1], "num_hidden_layers": 3, "rope_scaling": {"rope_type": "default"},
    },
    "mistral4": {"num_key_value_heads": 4},  # latent attention, whose head_dim is worked out
    "nemo_speechlm": {
        "audio_config": {"diarization_config": {"head_config": {"audio_hidden_size": 32}}},
        "text_config": _NEMOTRON_H, "word_timestamp_config": {"blank_token_id": 99},
    },
    "nemotron_h": _NEMOTRON_H,
    "phi4_multimodal": {
        "audio_config": {"num_blocks": 1, "nemo_conv_channels": 16, "ext_pw_out_channel": 32, "input_size": 16,
                         "depthwise_separable_out_channel": 32},
        "vision_config": {"crop_size": 32},
    },
    "qwen3_next": {"layer_types": ["linear_attention", "full_attention"]},
    "recurrent_gemma": {"num_hidden_layers": 3},  # the third layer is the one with attention
    "reformer": {
        "attn_layers": ["local", "lsh"], "axial_pos_shape": [8, 16], "axial_pos_embds_dim": [12, 20],
        "local_attn_chunk_length": 4, "lsh_attn_chunk_length": 4, "num_buckets": 2, "num_hashes": 1, "hash_seed": 0,
    },
    "roc_bert": {
        "pronunciation_vocab_size": 20, "pronunciation_embed_dim": 16, "shape_vocab_size": 20, "shape_embed_dim": 16,
    },
    "transfo-xl": {"cutoffs": [20, 50], "div_val": 1, "mem_len": 8},
    "xlstm": {
        "hidden_size": 128, "embedding_dim": 128, "num_blocks": 2, "chunk_size": 8, "ffn_round_up_to_multiple_of": 8,
    },
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "use_mamba_kernels": False, "num_hidden_layers": 6, "attn_layer_period": 2, "attn_layer_offset": 1,
    },
    "zamba2": {"num_hidden_layers": 4, "layers_block_type": ["mamba", "hybrid"] * 2, "chunk_size": 8},
    "zaya": {"num_experts_per_tok": 1},
    # text encoders, and encoder-decoders
    "canine": {"num_hash_buckets": 16, "downsampling_rate": 2, "local_transformer_stride": 4},
    "gptsan-japanese": {"d_ext": 32, "d_spout": 8, "num_switch_layers": 2, "num_ext_layers": 1},
    "layoutlmv3": {"coordinate_size": 6, "shape_size": 4, "input_size": 32, "has_relative_attention_bias": True},
    "led": {"attention_window": 4}, "longformer": {"attention_window": 4},
    "lilt": {"hidden_size": 48},  # six coordinates share it
    "luke": {"entity_vocab_size": 20},
    "markuplm": {"max_xpath_tag_unit_embeddings": 20, "max_xpath_subs_unit_embeddings": 20, "tag_pad_id": 10,
                 "subs_pad_id": 10, "xpath_unit_hidden_size": 4, "max_depth": 4},
    "neomme": {"head_dim": 16},  # a quarter of which is rotated, in pairs of two axes
    "perceiver": {"num_latents": 8, "d_latents": 32, "num_self_attends_per_block": 2, "qk_channels": 32,
                  "v_channels": 32},
    "squeezebert": {"embedding_size": 32},
    "wav2vec2": _WAVES,
    # images: four stages of one block, where the default has dozens
    "bit": {"embedding_size": 16, "hidden_sizes": [16, 32, 32, 64], "depths": [1] * 4, "num_groups": 2},
    "convnext": _CONVNEXT, "convnextv2": _CONVNEXT,
    "cvt": {"embed_dim": [16, 32, 32], "num_heads": [1, 2, 2], "depth": [1, 2, 3]},
    "swin": _SWIN, "donut-swin": _SWIN, "swinv2": {**_SWIN, "pretrained_window_sizes": [0, 0]},
    "efficientformer": {"hidden_sizes": [8, 16, 16, 32], "depths": [1] * 4, "resolution": 2, "key_dim": 4,
                        "image_size": 64, "attention_ratio": 2},
    "efficientnet": _EFFICIENTNET,
    "focalnet": {"embed_dim": 16, "hidden_sizes": [16, 32], "depths": [1, 1], "focal_levels": [2, 2],
                 "focal_windows": [3, 3], "patch_size": 4},
    "hgnet_v2": {"embedding_size": 16, "hidden_sizes": [32, 32, 64, 64], "depths": [1] * 4, "stem_channels": [3, 8, 16],
                 "stage_in_channels": [16, 32, 32, 64], "stage_mid_channels": [8, 8, 16, 16],
                 "stage_out_channels": [32, 32, 64, 64], "stage_num_blocks": [1] * 4, "stage_numb_of_layers": [2] * 4},
    "hiera": {"embed_dim": 16, "depths": [1, 1, 1], "num_heads": [1, 2, 2], "image_size": [32, 32],
              "num_query_pool": 2, "masked_unit_attention": [True, True, False]},
    "levit": {"hidden_sizes": [16, 32, 32], "num_attention_heads": [2, 2, 4], "depths": [1, 1, 1], "key_dim": [4, 4, 4],
              "patch_size": 16, "image_size": 64},
    "mobilenet_v1": {"depth_multiplier": 0.25}, "mobilenet_v2": {"depth_multiplier": 0.25},
    "mobilevit": {"hidden_sizes": [16, 24, 32], "neck_hidden_sizes": [8, 8, 16, 16, 24, 24, 32], "patch_size": 2,
                  "image_size": 64},
    "mobilevitv2": {"base_attn_unit_dims": [16, 16, 16], "n_attn_blocks": [1, 1, 1], "width_multiplier": 0.25,
                    "patch_size": 2, "image_size": 64},
    "poolformer": {"hidden_sizes": [8, 16, 24, 32], "depths": [1] * 4},
    "pvt": _PYRAMID, "pvt_v2": _PYRAMID, "segformer": {**_PYRAMID, "decoder_hidden_size": 16},
    "regnet": {"embedding_size": 8, "hidden_sizes": [16, 16, 32, 32], "depths": [1] * 4, "groups_width": 8},
    "resnet": {"embedding_size": 8, "hidden_sizes": [16, 16, 32, 32], "depths": [1] * 4},
    "shieldgemma2": {"image_token_index": 99, "mm_tokens_per_image": 4, "yes_token_index": 7, "no_token_index": 8},
    "swiftformer": {"embed_dims": [8, 16, 24, 32], "depths": [1] * 4},
    "textnet": {"stem_out_channels": 8, "hidden_sizes": [8, 8, 16, 16, 32]},
    "van": {"hidden_sizes": [8, 16, 24, 32], "depths": [1] * 4},
    "vit-hybrid": {"backbone_config": {"embedding_size": 16, "hidden_sizes": [16, 32, 32, 64], "depths": [1] * 4,
                                       "num_groups": 2, "layer_type": "bottleneck", "out_features": ["stage3"]},
                   "backbone_featmap_shape": [1, 32, 4, 4], "patch_size": 1, "image_size": 64},
    # sound
    "dia": {"delay_pattern": [0, 1, 2], "decoder_config": {"num_channels": 3, "cross_hidden_size": 32}},
    "kyutai_speech_to_text": {"codebook_vocab_size": 40, "num_codebooks": 2, "audio_pad_token_id": 180,
                              "audio_bos_token_id": 39, "codec_config": {"upsample_groups": 32, "num_filters": 4}},
    "fun_asr_nano": {
        "adaptor_config": {"intermediate_size": 8}, "audio_config": {"num_timestamp_prediction_layers": 1},
    },
    "moonshine": {"encoder_num_key_value_heads": 4, "decoder_num_key_value_heads": 4},
    "moonshine_streaming": {
        "num_key_value_heads": 4, "encoder_config": {"num_key_value_heads": 4, "frame_ms": 1.0},
    },
    "pop2piano": {"composer_vocab_size": 5},
    **{name: {"feature_projection_input_dim": 16, "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2,
              "conv_depthwise_kernel_size": 5, "max_source_positions": 128, "adaptor_kernel_size": 4,
              "adaptor_stride": 4} for name in ("seamless_m4t", "seamless_m4t_v2")},
    "speech_to_text": {"conv_channels": 32, "input_feat_per_channel": 16},
    "speecht5": {**_WAVES, "speech_decoder_prenet_units": 16, "speech_decoder_postnet_units": 16},
    "vibevoice": {"audio_config": _WAVEFORM, "semantic_model_config": _WAVEFORM},
    "vibevoice_asr": {"acoustic_tokenizer_encoder_config": _WAVEFORM, "semantic_tokenizer_encoder_config": _WAVEFORM},
    # an image's tower and a text's
    "align": {"vision_config": _EFFICIENTNET, "projection_dim": 16},
    "videoprism": {"vision_config": {"num_frames": 2, "tubelet_size": [1, 8, 8], "num_spatial_layers": 2,
                                     "num_temporal_layers": 1, "num_auxiliary_layers": 1}},
    "blip-2": {"qformer_config": {"use_qformer_text_input": True, "encoder_hidden_size": 32}, "num_query_tokens": 4},
}  # fmt: skip


def made_by_hand(model_type: str) -> PretrainedConfig | None:
    """A config of a type that joins two others, or None."""
    if model_type == "encoder-decoder":
        parts = tiny_config(BertConfig), tiny_config(BertConfig, {"is_decoder": True, "add_cross_attention": True})
        return EncoderDecoderConfig.from_encoder_decoder_configs(*parts, decoder_start_token_id=1, pad_token_id=0)
    if model_type == "speech-encoder-decoder":
        parts = (
            tiny_config(Wav2Vec2Config, OVERRIDES["wav2vec2"]),
            tiny_config(BertConfig, {"is_decoder": True, "add_cross_attention": True}),
        )
        return SpeechEncoderDecoderConfig.from_encoder_decoder_configs(*parts, decoder_start_token_id=1, pad_token_id=0)
    return None
