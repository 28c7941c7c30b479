"""Writes a model whose answers are known: given tools it calls `get_weather`, given a result or no tools it tells the
weather, and then it ends.

    python3 tests/clients/sdks/scripted.py DIRECTORY

Its layers are zero, so that a token alone decides the next one; the chat template's last token chooses the answer.
"""
import json
import pathlib
import struct
import sys

END, CALL, SAY = "<|end|>", "<|call|>", "<|say|>"
ARGUMENTS = {"location": "San Francisco, CA"}
CALLED = ["<tool_call>", "\n" + json.dumps({"name": "get_weather", "arguments": ARGUMENTS}), "\n", "</tool_call>"]
SAID = ["It is sunny", " in San Francisco."]
PATHS = [[CALL, *CALLED, END], [SAY, *SAID, END]]
BYTES = 256
TOKENS = [END, CALL, SAY, *CALLED, *SAID]
WIDTH, HEADS, INNER = 320, 5, 64

TEMPLATE = """
{%- for m in messages %}
{{- m.role ~ ': ' ~ (m.content or '') }}
{%- for call in m.tool_calls or [] %}
{{- '<tool_call>' ~ call.function | tojson ~ '</tool_call>' }}
{%- endfor %}
{{- '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|call|>' if tools and messages[-1].role != 'tool' else '<|say|>' }}
{%- endif %}
"""


def byte_characters():
    """The character that a byte-level tokenizer writes for each byte."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(BYTES) if byte not in plain]
    return {byte: chr(byte) for byte in plain} | {byte: chr(BYTES + at) for at, byte in enumerate(others)}


def tokenizer():
    characters = byte_characters()
    added = [{"id": BYTES + at, "content": text, "single_word": False, "lstrip": False, "rstrip": False,
              "normalized": False, "special": text in (END, CALL, SAY)} for at, text in enumerate(TOKENS)]
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    vocabulary = {characters[byte]: byte for byte in range(BYTES)}
    return {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "normalizer": None,
            "pre_tokenizer": level, "post_processor": None, "decoder": level,
            "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
                      "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "vocab": vocabulary,
                      "merges": []}}


def tensors():
    """Shape and entries that are not zero, by name: a token's row is its own direction, and its successor reads it."""
    size = BYTES + len(TOKENS)
    following = {token: END for token in range(BYTES)}
    for path in PATHS:
        following |= {BYTES + TOKENS.index(one): next_one for one, next_one in zip(path, path[1:])}
    ones = {"model.norm.weight": WIDTH, "model.layers.0.input_layernorm.weight": WIDTH,
            "model.layers.0.post_attention_layernorm.weight": WIDTH}
    zeros = {f"self_attn.{name}_proj": (WIDTH, WIDTH) for name in "qkvo"}
    zeros |= {"mlp.gate_proj": (INNER, WIDTH), "mlp.up_proj": (INNER, WIDTH), "mlp.down_proj": (WIDTH, INNER)}
    return {
        "model.embed_tokens.weight": ((size, WIDTH), [(token, token) for token in range(size)]),
        "lm_head.weight": ((size, WIDTH), [(BYTES + TOKENS.index(to), at) for at, to in following.items()]),
        **{name: ((width,), [(0, at) for at in range(width)]) for name, width in ones.items()},
        **{f"model.layers.0.{name}.weight": (shape, []) for name, shape in zeros.items()},
    }


def safetensors(all_tensors):
    header, data = {}, bytearray()
    for name, (shape, entries) in all_tensors.items():
        begin, columns = len(data), shape[-1]
        length = 4 * columns * (shape[0] if len(shape) == 2 else 1)
        data += bytes(length)
        for row, column in entries:
            struct.pack_into("<f", data, begin + 4 * (row * columns + column), 1.0)
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [begin, len(data)]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + data


def write(directory):
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": WIDTH, "num_hidden_layers": 1,
        "num_attention_heads": HEADS, "num_key_value_heads": HEADS, "head_dim": WIDTH // HEADS,
        "intermediate_size": INNER, "vocab_size": BYTES + len(TOKENS), "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5, "hidden_act": "silu", "rope_theta": 10000.0, "tie_word_embeddings": False,
        "torch_dtype": "float32", "eos_token_id": BYTES + TOKENS.index(END),
    }
    directory.mkdir(parents=True, exist_ok=True)
    for name, value in [("config.json", config), ("generation_config.json", {"do_sample": False}),
                        ("tokenizer.json", tokenizer()),
                        ("tokenizer_config.json", {"eos_token": END, "chat_template": TEMPLATE})]:
        (directory / name).write_text(json.dumps(value))
    (directory / "model.safetensors").write_bytes(safetensors(tensors()))


if __name__ == "__main__":
    write(pathlib.Path(sys.argv[1]))
