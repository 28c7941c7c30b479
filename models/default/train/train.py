"""Trains the small Llama of this folder on a CPU.

train.py TOKENIZER_FOLDER RUN_FOLDER SECONDS [key=value ...]

The learning rate follows the wall clock: warm-up steps, constant up to a share `hold` of SECONDS, then linear to
zero, so that annealing always completes, however slow the machine is.  RUN/ckpt.pt is written every few minutes and
a restart with the same arguments goes on from it.  RUN/loss.csv has step, tokens, seconds, loss.
Dialogues never share a row; a batch holds rows of about equal length.
"""
import os
import sys
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")   # busy-waiting threads are very slow on a shared machine
os.environ.setdefault("GOMP_SPINCOUNT", "0")
import math
import random
import time

import torch
import torch.nn as nn
import torch.nn.functional as F
from tokenizers import Tokenizer

import corpus


class Config:
    vocab = 1536; d = 192; layers = 4; heads = 6; kv = 2; ffn = 384
    theta = 100000.0; eps = 1e-5; context = 8192
    lr = 0.012; adam = 0.004; decay = 0.05; warmup = 100; hold = 0.45
    batch = 4096          # tokens a step
    user_loss = 0.3       # weight of the sampled user tokens
    user_part = 0.3       # share of user tokens that count at all
    short = 512           # longest row of a short dialogue
    long_from = 0.35      # from this share of the time on, long rows take part ...
    long_part = 0.35      # ... with this share of the tokens ...
    long_max = 2048       # ... and this length at most, until ...
    longer_from = 0.6     # ... some rows have twice that length
    gaps = 0.3            # share of rows whose positions jump ahead between turns (up to `context`)
    threads = 2; seed = 0


def attention(q, k, v):
    """Causal attention; short rows by plain products, which are four times faster there than the fused kernel."""
    B, H, T, D = q.shape
    G = k.shape[1]
    if T > 400:
        k, v = (y.repeat_interleave(H // G, 1) for y in (k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)
    with torch.autocast("cpu", enabled=False):
        s = torch.bmm(q.reshape(B * G, H // G * T, D), k.reshape(B * G, T, D).transpose(1, 2)).view(B * G, H // G, T, T) * D ** -0.5
        s = s + torch.full((T, T), float("-inf"), dtype=s.dtype).triu(1)
        return torch.bmm(torch.softmax(s, -1).view(B * G, -1, T), v.reshape(B * G, T, D)).view(B, H, T, D)


class Block(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.c, self.hd = c, c.d // c.heads
        self.n1, self.n2 = nn.Parameter(torch.ones(c.d)), nn.Parameter(torch.ones(c.d))
        self.q = nn.Linear(c.d, c.heads * self.hd, bias=False)
        self.k = nn.Linear(c.d, c.kv * self.hd, bias=False)
        self.v = nn.Linear(c.d, c.kv * self.hd, bias=False)
        self.o = nn.Linear(c.heads * self.hd, c.d, bias=False)
        self.g = nn.Linear(c.d, c.ffn, bias=False)
        self.u = nn.Linear(c.d, c.ffn, bias=False)
        self.dn = nn.Linear(c.ffn, c.d, bias=False)

    def forward(self, x, cos, sin):
        B, T, D = x.shape
        c = self.c

        def heads(y, n):
            return y.view(B, T, n, self.hd).transpose(1, 2)

        def rotate(y):
            h = self.hd // 2
            return y * cos + torch.cat([-y[..., h:], y[..., :h]], -1) * sin

        h = F.rms_norm(x, (D,), self.n1, c.eps)
        q, k, v = rotate(heads(self.q(h), c.heads)), rotate(heads(self.k(h), c.kv)), heads(self.v(h), c.kv)
        a = attention(q, k, v)
        x = x + self.o(a.transpose(1, 2).reshape(B, T, -1))
        h = F.rms_norm(x, (D,), self.n2, c.eps)
        return x + self.dn(F.silu(self.g(h)) * self.u(h))


class Model(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.c = c
        self.emb = nn.Embedding(c.vocab, c.d)
        self.blocks = nn.ModuleList(Block(c) for _ in range(c.layers))
        self.nf = nn.Parameter(torch.ones(c.d))
        for n, p in self.named_parameters():
            if p.dim() == 2:
                out = n.endswith(("o.weight", "dn.weight"))
                nn.init.normal_(p, std=0.02 if "emb" in n else p.shape[1] ** -0.5 * (.3 if out else 1))
        hd = c.d // c.heads
        a = torch.outer(torch.arange(c.context).float(), 1 / c.theta ** (torch.arange(0, hd, 2).float() / hd))
        a = torch.cat([a, a], -1)
        self.register_buffer("cos", a.cos(), False)
        self.register_buffer("sin", a.sin(), False)

    def loss(self, ids, weight, pos):
        x = self.emb(ids[:, :-1])
        pos = pos[:, :-1]
        cos, sin = (t[pos].unsqueeze(1).to(torch.bfloat16) for t in (self.cos, self.sin))
        for b in self.blocks:
            x = b(x, cos, sin)
        x = F.rms_norm(x, (self.c.d,), self.nf, self.c.eps).flatten(0, 1)
        y, w = ids[:, 1:].flatten(), weight[:, 1:].flatten()
        keep = w > 0
        w = w[keep]
        loss = F.cross_entropy(F.linear(x[keep], self.emb.weight).float(), y[keep], reduction="none")
        return (loss * w).sum() / w.sum(), loss.detach()[w == 1].mean()


class Batches:
    """Batches (ids, weights, positions) for a share `at` of the training time, which the caller sets."""

    def __init__(self, tok, c, seed):
        self.tok, self.c, self.r, self.at = tok, c, random.Random(seed), 0.0
        self.USER, self.ASSISTANT, self.END, self.PAD, self.SYSTEM, self.TOOL = (
            tok.token_to_id(f"<|{x}|>") for x in ("user", "assistant", "end", "pad", "system", "tool"))

    def pool(self):
        """About 40 batches of dialogues, encoded."""
        c, r = self.c, self.r
        want, ds = 40 * c.batch, []
        part = c.long_part if self.at >= c.long_from else 0
        early = self.at < .1
        n = int(want * (1 - part) / (120 if early else 170))
        ds = [(c.short, corpus.dialogue(r, turns=r.randint(1, 6) if early else None, copying=early and r.random() < .5)) for _ in range(n)]
        tokens = 0
        while tokens < want * part:
            length = r.choice([640, 1024, 1536, c.long_max, c.long_max, c.long_max * (2 if self.at >= c.longer_from else 1)])
            ds.append((length, corpus.dialogue(r, chars=int(length * 3.3))))
            tokens += length
        return [self.encode(e.ids[:m]) for (m, _), e in zip(ds, self.tok.encode_batch([corpus.render(d) for _, d in ds]))]

    def encode(self, ids):
        c, r = self.c, self.r
        weight, answer = [], False
        for i in ids:
            if i in (self.USER, self.SYSTEM, self.TOOL):
                answer = False
            marker = i in (self.USER, self.SYSTEM, self.TOOL, self.ASSISTANT)
            weight.append(1.0 if answer and not marker else 0.0 if marker or r.random() > c.user_part else c.user_loss)
            if i == self.ASSISTANT:
                answer = True
        pos = list(range(len(ids)))
        if r.random() < c.gaps:
            ends = [j + 1 for j, i in enumerate(ids[:-1]) if i == self.END]
            room = c.context - len(ids)
            for j in sorted(r.sample(ends, min(len(ends), r.randint(1, 3)))):
                jump = min(room, int(16 * 2 ** (r.random() * math.log2(c.context / 16))))
                room -= jump
                for k in range(j, len(pos)):
                    pos[k] += jump
        return ids, weight, pos

    def __iter__(self):
        while True:
            rows = sorted(self.pool(), key=lambda x: len(x[0]))
            groups, i = [], 0
            while i < len(rows):
                j = i + 1
                while j < len(rows) and len(rows[j][0]) * (j - i + 1) <= self.c.batch:
                    j += 1
                groups.append(rows[i:j])
                i = j
            self.r.shuffle(groups)
            for g in groups:
                n = max(len(x[0]) for x in g)
                yield tuple(torch.tensor([x[k] + [fill] * (n - len(x[k])) for x in g]) for k, fill in ((0, self.PAD), (1, 0.0), (2, 0)))


def main():
    folder, run, total = sys.argv[1], sys.argv[2], float(sys.argv[3])
    c = Config()
    for kv in sys.argv[4:]:
        k, v = kv.split("=")
        setattr(c, k, type(getattr(Config, k))(v))
    os.makedirs(run, exist_ok=True)
    tok = Tokenizer.from_file(f"{folder}/tokenizer.json")
    c.vocab = tok.get_vocab_size()
    torch.manual_seed(c.seed)
    torch.set_num_threads(c.threads)
    m = Model(c)
    params = list(m.named_parameters())
    matrices = [p for n, p in params if p.dim() == 2 and "emb" not in n]
    opts = [torch.optim.AdamW([p for n, p in params if p.dim() != 2 or "emb" in n], lr=c.adam, betas=(.9, .95), weight_decay=0.0),
            torch.optim.Muon(matrices, lr=c.lr, weight_decay=c.decay, momentum=.95, adjust_lr_fn="original")]
    base = [o.param_groups[0]["lr"] for o in opts]
    spent, step, tokens = 0.0, 0, 0
    if os.path.exists(f"{run}/ckpt.pt"):
        ck = torch.load(f"{run}/ckpt.pt", weights_only=False)
        m.load_state_dict(ck["m"])
        for o, s in zip(opts, ck["o"]):
            o.load_state_dict(s)
        spent, step, tokens = ck["spent"], ck["step"], ck["tokens"]
    else:
        with open(f"{run}/loss.csv", "w") as f:
            f.write("step,tokens,seconds,loss\n")
    n = sum(p.numel() for p in m.parameters())
    print(f"{n} parameters, from step {step}, {spent:.0f} s", flush=True)
    cfg = {k: getattr(c, k) for k in vars(Config) if not k.startswith("_")}

    def save():
        torch.save(dict(m=m.state_dict(), o=[o.state_dict() for o in opts], spent=now, step=step, tokens=tokens, cfg=cfg, params=n), f"{run}/ckpt.tmp")
        os.replace(f"{run}/ckpt.tmp", f"{run}/ckpt.pt")

    start, now, acc, saved = time.time() - spent, spent, [], spent
    data = Batches(tok, c, 1000 * c.seed + 1000 + step)
    data.at = spent / total
    for ids, weight, pos in data:
        now = time.time() - start
        if now >= total:
            break
        data.at = now / total
        scale = min(1, (step + 1) / c.warmup) * min(1, max(.01, (1 - data.at) / (1 - c.hold)))
        for o, b in zip(opts, base):
            o.param_groups[0]["lr"] = b * scale
        with torch.autocast("cpu", torch.bfloat16):
            loss, answers = m.loss(ids, weight, pos)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(m.parameters(), 1.0)
        for o in opts:
            o.step()
            o.zero_grad(set_to_none=True)
        step += 1
        tokens += ids.numel()
        acc.append(answers.item())
        if step % 50 == 0:
            with open(f"{run}/loss.csv", "a") as f:
                f.write(f"{step},{tokens},{now:.0f},{sum(acc) / len(acc):.4f}\n")
            print(f"step {step}  tokens {tokens}  {now:.0f} s  loss {sum(acc) / len(acc):.4f}", flush=True)
            acc = []
        if now - saved > 240:
            save()
            saved = now
    save()
    print(f"done: {step} steps, {tokens} tokens, {now:.0f} s", flush=True)


if __name__ == "__main__":
    main()
