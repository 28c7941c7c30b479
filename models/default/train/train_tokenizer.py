"""train_tokenizer.py OUT [VOCAB [DIALOGUES]]: writes OUT/tokenizer.json and OUT/tokenizer_config.json.

Byte-level BPE; every digit and every punctuation mark is a token of its own, one special token a role.
"""
import json
import os
import random
import sys

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

import corpus

SPECIAL = ["<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>", "<|tool|>"]
CONTEXT = 8192
SEED = 7
TEMPLATE = """\
{%- macro text(c) -%}
{%- if c is string -%}{{ c }}{%- elif c -%}{%- for part in c -%}{%- if part is string -%}{{ part }}{%- elif part.type == 'text' -%}{{ part.text }}{%- endif -%}{%- endfor -%}{%- endif -%}
{%- endmacro -%}
{%- if tools -%}
{{ '<|system|>You can use these tools:' }}
{%- for tool in tools -%}
{%- set f = tool.function if tool.function is defined else tool -%}
{{ '\\n- ' ~ f.name }}{%- if f.description -%}{{ ': ' ~ f.description }}{%- endif -%}
{%- endfor -%}
{{ '<|end|>' }}
{%- endif -%}
{%- for m in messages -%}
{{ '<|' ~ ('system' if m.role == 'developer' else ('tool' if m.role == 'function' else m.role)) ~ '|>' }}{{ text(m.content) }}
{%- if m.tool_calls -%}
{%- for call in m.tool_calls -%}
{%- set f = call.function if call.function is defined else call -%}
{{ '<tool_call>{"name": "' ~ f.name ~ '", "arguments": ' }}{%- if f.arguments is string -%}{{ f.arguments }}{%- else -%}{{ f.arguments | tojson }}{%- endif -%}{{ '}</tool_call>' }}
{%- endfor -%}
{%- endif -%}
{{ '<|end|>' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|assistant|>' }}{%- endif -%}
"""


def main(out, vocab=1536, dialogues=30000):
    r = random.Random(SEED)
    t = Tokenizer(models.BPE())
    t.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(r"\p{N}| ?\p{L}+| ?[^\s\p{L}\p{N}]|\s"), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    t.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=vocab, special_tokens=SPECIAL, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
                                  show_progress=False, max_token_length=12)
    t.train_from_iterator(("\n".join(x for _, x in corpus.dialogue(r)) for _ in range(dialogues)), trainer)
    os.makedirs(out, exist_ok=True)
    t.save(f"{out}/tokenizer.json")
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|end|>", "pad_token": "<|pad|>", "model_max_length": CONTEXT,
              "clean_up_tokenization_spaces": False, "chat_template": TEMPLATE.rstrip("\n")}
    with open(f"{out}/tokenizer_config.json", "w") as f:
        json.dump(config, f, indent=1)
    sample = "My name is Beatrice Thornbury and the code is QX-4821. Zorvinal lives in Tromsø."
    print(t.get_vocab_size(), [t.decode([i]) for i in t.encode(sample).ids])


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
