"""plot_loss.py loss.csv loss.svg: draws the loss of the assistant's tokens (logarithmic) over the trained tokens."""
import csv
import math
import sys

W, H, L, B, T, R = 720, 360, 60, 44, 24, 16


def main(source, target):
    with open(source) as f:
        rows = [(int(x["tokens"]), float(x["loss"])) for x in csv.DictReader(f)]
    top = max(t for t, _ in rows)
    lo, hi = math.floor(math.log10(min(v for _, v in rows))), math.ceil(math.log10(max(v for _, v in rows)))

    def x(tokens):
        return L + (W - L - R) * tokens / top

    def y(loss):
        return T + (H - T - B) * (hi - math.log10(loss)) / (hi - lo)

    out = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {W} {H}" font-family="sans-serif" font-size="12">',
           f'<rect width="{W}" height="{H}" fill="#fff"/>']
    for e in range(lo, hi + 1):
        for k in (1, 2, 5):
            if lo <= math.log10(k * 10 ** e) <= hi + 1e-9:
                v = k * 10.0 ** e
                out.append(f'<path d="M{L} {y(v):.1f}H{W - R}" stroke="#ddd"/><text x="{L - 6}" y="{y(v) + 4:.1f}" text-anchor="end">{v:g}</text>')
    step = 5e6 if top < 4e7 else 1e7
    for i in range(int(top // step) + 1):
        out.append(f'<text x="{x(i * step):.1f}" y="{H - B + 18}" text-anchor="middle">{i * step / 1e6:g}</text>')
    line = " ".join(f"{x(t):.1f},{y(v):.1f}" for t, v in rows)
    out += [f'<polyline points="{line}" fill="none" stroke="#1565c0" stroke-width="1.5"/>',
            f'<text x="{(L + W - R) / 2}" y="{H - 8}" text-anchor="middle">million tokens</text>',
            f'<text x="{L}" y="16">loss of the assistant\'s tokens (nats, mean of 50 steps)</text>', "</svg>"]
    with open(target, "w") as f:
        f.write("\n".join(out) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:3])
