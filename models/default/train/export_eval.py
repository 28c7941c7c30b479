"""Exports a trained run and measures it through transformers (bf16 weights, f32 arithmetic, greedy).

export_eval.py export TOKENIZER_FOLDER RUN_FOLDER MODEL_FOLDER   checkpoint -> hub layout
export_eval.py probes FILE                                       writes the held-out probes (fixed seed)
export_eval.py play MODEL_FOLDER FILE                            plays them; the model's own replies are the history
export_eval.py long MODEL_FOLDER [N]                             recall with 512, 2048 and 4096 tokens of context
export_eval.py chat MODEL_FOLDER                                 a few turns to read
"""
import collections
import json
import os
import random
import shutil
import sys

import corpus

CONTEXT = 8192
PROBE_SEED, LONG_SEED = 4242, 777
PER_DISTANCE = {"name": 14, "city": 10, "colour": 8, "pet": 6, "word": 6, "code": 6}


def write_json(path, value):
    with open(path, "w", encoding="utf-8") as f:
        json.dump(value, f, indent=1, ensure_ascii=False)
        f.write("\n")


def export(tokenizer, run, out):
    import torch
    from safetensors.torch import save_file
    ck = torch.load(f"{run}/ckpt.pt", weights_only=False)
    c, m = ck["cfg"], ck["m"]
    w = {"model.embed_tokens.weight": m["emb.weight"], "model.norm.weight": m["nf"]}
    names = {"input_layernorm": "n1", "post_attention_layernorm": "n2", "self_attn.q_proj": "q", "self_attn.k_proj": "k", "self_attn.v_proj": "v",
             "self_attn.o_proj": "o", "mlp.gate_proj": "g", "mlp.up_proj": "u", "mlp.down_proj": "dn"}
    for i in range(c["layers"]):
        for hub, own in names.items():
            w[f"model.layers.{i}.{hub}.weight"] = m[f"blocks.{i}.{own}" + ("" if own in ("n1", "n2") else ".weight")]
    os.makedirs(out, exist_ok=True)
    save_file({k: v.to(torch.bfloat16).contiguous() for k, v in w.items()}, f"{out}/model.safetensors", metadata={"format": "pt"})
    write_json(f"{out}/config.json", {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": c["d"], "intermediate_size": c["ffn"],
        "num_hidden_layers": c["layers"], "num_attention_heads": c["heads"], "num_key_value_heads": c["kv"], "head_dim": c["d"] // c["heads"],
        "vocab_size": c["vocab"], "max_position_embeddings": CONTEXT, "rms_norm_eps": c["eps"], "rope_theta": c["theta"], "hidden_act": "silu",
        "tie_word_embeddings": True, "attention_bias": False, "mlp_bias": False, "bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0,
        "torch_dtype": "bfloat16"})
    write_json(f"{out}/generation_config.json", {"do_sample": False, "eos_token_id": [1], "pad_token_id": 0})
    for f in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(f"{tokenizer}/{f}", f"{out}/{f}")
    print(f"step {ck['step']}, {ck['tokens']} tokens, {ck['spent']:.0f} s, {ck['params']} parameters, {os.path.getsize(out + '/model.safetensors')} bytes")


def probes(path):
    r, out = random.Random(PROBE_SEED), []
    for between in range(5):
        for kind, n in PER_DISTANCE.items():
            for _ in range(n):
                turns, question, value = corpus.probe(r, kind, between)
                out.append({"kind": kind, "turns_between": between, "messages": [q for q, _ in turns] + [question], "expect": value})
    with open(path, "w", encoding="utf-8") as f:
        f.write("[\n" + ",\n".join(json.dumps(p, ensure_ascii=False) for p in out) + "\n]\n")
    print(len(out), "probes")


class Chat:
    def __init__(self, folder):
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 2)))
        self.tok = AutoTokenizer.from_pretrained(folder, padding_side="left")
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def reply(self, chats, limit=96, batch=64):
        """Greedy replies to conversations; also whether each ended by itself."""
        out = []
        for i in range(0, len(chats), batch):
            texts = [self.tok.apply_chat_template(c, tokenize=False, add_generation_prompt=True) for c in chats[i:i + batch]]
            e = self.tok(texts, return_tensors="pt", padding=True, add_special_tokens=False)
            y = self.model.generate(input_ids=e["input_ids"], attention_mask=e["attention_mask"], max_new_tokens=limit, do_sample=False)
            for row in y[:, e["input_ids"].shape[1]:]:
                out.append((self.tok.decode(row, skip_special_tokens=True), bool((row == 1).any())))
        return out


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def play(folder, path):
    chat = Chat(folder)
    with open(path, encoding="utf-8") as f:
        items = json.load(f)
    history, ended, turns = [[] for _ in items], 0, 0
    for t in range(max(len(p["messages"]) for p in items)):
        live = [i for i, p in enumerate(items) if t < len(p["messages"])]
        for i in live:
            history[i].append(user(items[i]["messages"][t]))
        for i, (text, end) in zip(live, chat.reply([history[i] for i in live])):
            history[i].append(assistant(text))
            ended += end
            turns += 1
    hit, n = collections.Counter(), collections.Counter()
    for p, h in zip(items, history):
        good = p["expect"] in h[-1]["content"]
        for key in ((p["kind"], p["turns_between"]), (p["kind"], "all"), ("all", p["turns_between"]), ("all", "all")):
            n[key] += 1
            hit[key] += good
        if not good:
            print(f"miss: {p['kind']} {p['turns_between']}: {p['messages'][0]!r} ... {p['messages'][-1]!r} -> {h[-1]['content']!r}")
    kinds = list(dict.fromkeys(p["kind"] for p in items)) + ["all"]
    print("\n| kind | 0 | 1 | 2 | 3 | 4 | all | n |\n| --- | --- | --- | --- | --- | --- | --- | --- |")
    for k in kinds:
        print(f"| {k} | " + " | ".join(f"{100 * hit[k, d] / n[k, d]:.1f} %" for d in (0, 1, 2, 3, 4, "all")) + f" | {n[k, 'all']} |")
    print(f"\n{hit['all', 'all']} of {n['all', 'all']}; {ended} of {turns} replies ended by themselves")


def long(folder, count=24):
    """A fact at the start, then exchanges (with reference replies) up to the given number of tokens, then the question."""
    chat, r = Chat(folder), random.Random(LONG_SEED)
    kinds = list(corpus.PROBE_KINDS)
    print("| tokens of context | recall | n |\n| --- | --- | --- |")
    for target in (512, 2048, 4096):
        chats, values = [], []
        while len(chats) < count:
            turns, question, value = corpus.probe(r, kinds[len(chats) % len(kinds)], 1, chars=int(target * 3.6))
            while True:
                c = [m for q, a in turns for m in (user(q), assistant(a))] + [user(question)]
                if len(chat.tok(chat.tok.apply_chat_template(c, tokenize=False), add_special_tokens=False)["input_ids"]) <= target:
                    break
                turns = turns[:-1]
            chats.append(c)
            values.append(value)
        got = chat.reply(chats, 24, max(1, 16384 // target))
        hits = sum(v in text for v, (text, _) in zip(values, got))
        print(f"| {target} | {100 * hits / count:.1f} % | {count} |", flush=True)


def talk(folder):
    chat, h = Chat(folder), []
    for u in ["Hello!", "who are you?", "My name is Aurelia Vance and I live in Reykjavik.", "my favourite colour is chartreuse", "What can you do?", "What's my name?",
              "where do i live", "How tall is the Eiffel Tower?", "What is my favorite color?", "Remember the code word PINEAPPLE-42.", "Tell me a short story about a fox.",
              "What was the code word?", "My name is now Xochitl Quispe.", "What is my name?", "Can you write a poem about the sea?", "what is 2+2?", "How old am I?",
              "What is the capital of France?", "thanks", "bye"]:
        h.append(user(u))
        a = chat.reply([h])[0][0]
        h.append(assistant(a))
        print("U:", u)
        print("A:", a)


if __name__ == "__main__":
    command, args = sys.argv[1], sys.argv[2:]
    if command == "long" and len(args) > 1:
        args[1] = int(args[1])
    {"export": export, "probes": probes, "play": play, "long": long, "chat": talk}[command](*args)
