"""The peer of `end_to_end.py`: a plain eager PyTorch training script in the style of nanoGPT, without gptlab.

A single file with a GPT with fused scaled-dot-product attention, cross-entropy over the full logits, a memory map that
is opened for every batch, random offsets, AdamW with two groups and PyTorch's loop over the parameters (the default on
a CPU), clipping, warm-up and cosine decay, and the loss of 20 random batches of each split every 250 steps and at the
end. The defaults are those of the recipe `shakespeare-char-cpu`. The GELU is exact, as in nanoGPT; `--gelu tanh` is
GPT-2's, which takes PyTorch nearly three times as long on a CPU. `end_to_end.py` passes the GELU of its recipe.

It reads a folder with train.bin and val.bin, which hold uint16 ids without a header.

    python benchmarks/plain_loop.py --data data/shakespeare-char
"""

import argparse
import json
import math
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F


class Norm(nn.Module):
    def __init__(self, width, bias):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width)) if bias else None

    def forward(self, x):
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, 1e-5)


class SelfAttention(nn.Module):
    def __init__(self, args):
        super().__init__()
        self.heads = args.n_head
        self.qkv = nn.Linear(args.n_embd, 3 * args.n_embd, bias=args.bias)
        self.out = nn.Linear(args.n_embd, args.n_embd, bias=args.bias)

    def forward(self, x):  # (B, T, C)
        B, T, C = x.shape
        heads = [t.view(B, T, self.heads, -1).transpose(1, 2) for t in self.qkv(x).split(C, dim=-1)]  # (B, H, T, D)
        y = F.scaled_dot_product_attention(*heads, is_causal=True)
        return self.out(y.transpose(1, 2).contiguous().view(B, T, C))


class Layer(nn.Module):
    def __init__(self, args):
        super().__init__()
        self.norm_1, self.attention = Norm(args.n_embd, args.bias), SelfAttention(args)
        self.norm_2 = Norm(args.n_embd, args.bias)
        self.up = nn.Linear(args.n_embd, 4 * args.n_embd, bias=args.bias)
        self.gelu = nn.GELU(approximate="tanh" if args.gelu == "tanh" else "none")
        self.down = nn.Linear(4 * args.n_embd, args.n_embd, bias=args.bias)

    def forward(self, x):
        x = x + self.attention(self.norm_1(x))
        return x + self.down(self.gelu(self.up(self.norm_2(x))))


class GPT(nn.Module):
    def __init__(self, args):
        super().__init__()
        self.tokens = nn.Embedding(args.vocab_size, args.n_embd)
        self.positions = nn.Embedding(args.block_size, args.n_embd)
        self.layers = nn.ModuleList(Layer(args) for _ in range(args.n_layer))
        self.norm = Norm(args.n_embd, args.bias)
        self.head = nn.Linear(args.n_embd, args.vocab_size, bias=False)
        self.head.weight = self.tokens.weight
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                residual = name.endswith(("out.weight", "down.weight"))
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * args.n_layer) if residual else 0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(self, ids, targets):  # (B, T) each
        x = self.tokens(ids) + self.positions(torch.arange(ids.shape[1]))
        for layer in self.layers:
            x = layer(x)
        logits = self.head(self.norm(x))  # (B, T, V)
        return F.cross_entropy(logits.view(-1, logits.shape[-1]), targets.view(-1))


def get_batch(args, split):
    ids = np.memmap(args.data / f"{split}.bin", dtype=np.uint16, mode="r")  # a long-lived map leaks
    offsets = torch.randint(len(ids) - args.block_size, (args.batch_size,))
    rows = [torch.from_numpy(ids[i : i + args.block_size + 1].astype(np.int64)) for i in offsets]
    batch = torch.stack(rows)  # (B, T + 1)
    return batch[:, :-1].contiguous(), batch[:, 1:].contiguous()


@torch.no_grad()
def estimate_loss(args, model):
    model.eval()
    means = {}
    for split in ("train", "val"):
        losses = torch.zeros(args.eval_iters)
        for k in range(args.eval_iters):
            losses[k] = model(*get_batch(args, split)).item()
        means[split] = losses.mean().item()
    model.train()
    return means


def learning_rate(args, step):
    if step < args.warmup_steps:
        return args.lr * (step + 1) / args.warmup_steps
    done = min(1.0, (step - args.warmup_steps) / max(1, args.decay_steps - args.warmup_steps))
    return args.min_lr + 0.5 * (1 + math.cos(math.pi * done)) * (args.lr - args.min_lr)


def main(args):
    began = time.perf_counter()
    torch.manual_seed(args.seed)
    model = GPT(args)
    decays = [p for p in model.parameters() if p.dim() >= 2]
    rest = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": decays, "weight_decay": args.weight_decay}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(args.beta1, args.beta2), foreach=False, fused=False)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {torch.get_num_threads()} threads")

    best, step_seconds, evaluations = math.inf, [], []
    x, y = get_batch(args, "train")
    for step in range(args.steps + 1):
        if step % args.eval_every == 0 or step == args.steps:
            losses = estimate_loss(args, model)
            evaluations.append({"step": step, **losses})
            print(f"step {step}: train loss {losses['train']:.4f}, val loss {losses['val']:.4f}", flush=True)
            if args.save and step and losses["val"] < best:
                best = losses["val"]
                torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step}, args.save)
        if step == args.steps:
            break
        start = time.perf_counter()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(args, step)
        loss = model(x, y)
        x, y = get_batch(args, "train")  # the next batch; on a GPU, the forward pass hides this time
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), args.grad_clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % args.log_every == 0:
            value = loss.item()
            print(f"iter {step}: loss {value:.4f}, time {1000 * (time.perf_counter() - start):.2f} ms", flush=True)
        step_seconds.append(time.perf_counter() - start)

    median = sorted(step_seconds)[len(step_seconds) // 2] if step_seconds else math.nan
    print(f"{1000 * median:.2f} ms a step (median), {time.perf_counter() - began:.2f} s after the imports")
    if args.json:
        measured = {"step_ms": 1000 * median, "evaluations": evaluations, "threads": torch.get_num_threads()}
        args.json.write_text(json.dumps(measured, indent=2) + "\n", encoding="utf-8")


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="holds train.bin and val.bin")
    parser.add_argument("--vocab-size", type=int, default=65)
    parser.add_argument("--n-layer", type=int, default=4)
    parser.add_argument("--n-head", type=int, default=4)
    parser.add_argument("--n-embd", type=int, default=128)
    parser.add_argument("--block-size", type=int, default=64)
    parser.add_argument("--bias", action="store_true")
    parser.add_argument("--gelu", choices=["tanh", "erf"], default="erf")
    parser.add_argument("--batch-size", type=int, default=12, help="sequences")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--eval-every", type=int, default=250, help="steps")
    parser.add_argument("--eval-iters", type=int, default=20, help="batches of each split per evaluation")
    parser.add_argument("--log-every", type=int, default=10, help="steps")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--min-lr", type=float, default=1e-4)
    parser.add_argument("--warmup-steps", type=int, default=100)
    parser.add_argument("--decay-steps", type=int, default=0, help="0 means --steps")
    parser.add_argument("--beta1", type=float, default=0.9)
    parser.add_argument("--beta2", type=float, default=0.99)
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--grad-clip", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=1337)
    parser.add_argument("--save", type=Path, metavar="FILE", help="save the best model here (default: not saved)")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    args.decay_steps = args.decay_steps or args.steps
    return args


if __name__ == "__main__":
    main(arguments())
