"""One block of gated_lru.py in a process of its own.

python _gated_lru_worker.py ours|transformers|jax FOLDER THREADS

FOLDER holds x.npy, g.npy and weights.npz (ours by name). Each line of input is one forward and backward pass, after
one that is not counted; the answer is its wall time, its processor time (seconds) and the bytes by which its peak of
resident memory exceeded what stood before. The very first pass writes y, dx and gradients of parameters to
FOLDER/NAME.npz, by our names.
"""

import os
import resource
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

Arrays = dict[str, np.ndarray]
WARM = 8
"""Steps of the pass that compiles what is compiled, where that does not depend on the length."""

# Ours to theirs; what is a matrix of Flax is ours turned.
TRANSFORMERS = {
    "linear_x.weight": "linear_x.weight", "linear_x.bias": "linear_x.bias",
    "linear_y.weight": "linear_y.weight", "linear_y.bias": "linear_y.bias",
    "linear_out.weight": "linear_out.weight", "linear_out.bias": "linear_out.bias",
    "conv_weight": "conv_1d.weight", "conv_bias": "conv_1d.bias", "lru.decay": "rg_lru.recurrent_param",
    "lru.input_gate.weight": "rg_lru.input_gate_weight", "lru.input_gate.bias": "rg_lru.input_gate_bias",
    "lru.decay_gate.weight": "rg_lru.recurrent_gate_weight", "lru.decay_gate.bias": "rg_lru.recurrent_gate_bias",
}  # fmt: skip
JAX = {
    "linear_x.weight": ("linear_x", "kernel"), "linear_x.bias": ("linear_x", "bias"),
    "linear_y.weight": ("linear_y", "kernel"), "linear_y.bias": ("linear_y", "bias"),
    "linear_out.weight": ("linear_out", "kernel"), "linear_out.bias": ("linear_out", "bias"),
    "conv_weight": ("conv_1d", "w"), "conv_bias": ("conv_1d", "b"), "lru.decay": ("rg_lru", "a_param"),
    "lru.input_gate.weight": ("rg_lru", "input_gate", "w"), "lru.input_gate.bias": ("rg_lru", "input_gate", "b"),
    "lru.decay_gate.weight": ("rg_lru", "a_gate", "w"), "lru.decay_gate.bias": ("rg_lru", "a_gate", "b"),
}  # fmt: skip


def torch_pass(module: Any, call: Callable[[Any], Any], x: np.ndarray, g: np.ndarray) -> Callable[[], Any]:
    import torch

    def once(x: Any, g: Any) -> Any:
        module.zero_grad()
        x.grad = None
        y = call(x)
        y.backward(g)
        return y.detach(), x.grad, {name: p.grad for name, p in module.named_parameters()}

    once(torch.from_numpy(x[:, :WARM].copy()).requires_grad_(), torch.from_numpy(g[:, :WARM].copy()))
    inputs, grads = torch.from_numpy(x).requires_grad_(), torch.from_numpy(g)
    return lambda: once(inputs, grads)


def ours(x: np.ndarray, g: np.ndarray, weights: Arrays) -> tuple[Callable[[], Any], Callable[[Any], Arrays]]:
    import torch

    from pliant.mixers import GatedLRU

    module = GatedLRU(x.shape[2], num_heads=len(weights["lru.input_gate.bias"]))
    module.load_state_dict({name: torch.from_numpy(w) for name, w in weights.items()})

    def named(found: Any) -> Arrays:
        y, dx, grads = found
        return {"y": y, "dx": dx, **grads}

    return torch_pass(module, lambda x: module(x)[0], x, g), named


def transformers(x: np.ndarray, g: np.ndarray, weights: Arrays) -> tuple[Callable[[], Any], Callable[[Any], Arrays]]:
    import torch
    from transformers import RecurrentGemmaConfig
    from transformers.models.recurrent_gemma.modeling_recurrent_gemma import RecurrentGemmaRecurrentBlock

    width = x.shape[2]
    config = RecurrentGemmaConfig(
        hidden_size=width, lru_width=width, num_attention_heads=len(weights["lru.input_gate.bias"])
    )
    module = RecurrentGemmaRecurrentBlock(config, 0)
    ours_to_theirs = {name: torch.from_numpy(w) for name, w in weights.items()}
    ours_to_theirs["conv_weight"] = ours_to_theirs["conv_weight"].T[:, None]
    module.load_state_dict({TRANSFORMERS[name]: w for name, w in ours_to_theirs.items()})

    def call(x: Any) -> Any:
        return module(x, torch.arange(x.shape[1]).expand(x.shape[:2]), None, use_cache=False)[0]

    def named(found: Any) -> Arrays:
        y, dx, grads = found
        mine = {name: grads[theirs] for name, theirs in TRANSFORMERS.items()}
        return {"y": y, "dx": dx, **mine, "conv_weight": mine["conv_weight"][:, 0].T}

    return torch_pass(module, call, x, g), named


def jax(x: np.ndarray, g: np.ndarray, weights: Arrays) -> tuple[Callable[[], Any], Callable[[Any], Arrays]]:
    import jax
    import jax.numpy as jnp
    from recurrentgemma.jax.modules import RecurrentBlock

    block = RecurrentBlock(width=x.shape[2], num_heads=len(weights["lru.input_gate.bias"]))
    tree: dict[str, Any] = {}
    for name, path in JAX.items():
        at = tree
        for part in path[:-1]:
            at = at.setdefault(part, {})
        at[path[-1]] = jnp.asarray(weights[name].T if path[-1] == "kernel" else weights[name])
    positions = jnp.broadcast_to(jnp.arange(x.shape[1]), x.shape[:2])

    def both(tree: Any, x: Any, g: Any) -> Any:
        y, back = jax.vjp(lambda tree, x: block.apply({"params": tree}, x, positions, return_cache=False)[0], tree, x)
        return y, *back(g)

    inputs, grads = jnp.asarray(x), jnp.asarray(g)
    compiled = jax.jit(both).lower(tree, inputs, grads).compile()

    def named(found: Any) -> Arrays:
        y, dtree, dx = found
        mine = {}
        for name, path in JAX.items():
            at = dtree
            for part in path:
                at = at[part]
            mine[name] = at.T if path[-1] == "kernel" else at
        return {"y": y, "dx": dx, **mine}

    return lambda: jax.block_until_ready(compiled(tree, inputs, grads)), named


def resident(which: str) -> int:
    """VmRSS or VmHWM of this process, bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(which):
            return 1024 * int(line.split()[1])
    raise RuntimeError(f"/proc/self/status names no {which}")


def processor() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def main() -> None:
    name, folder, threads = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    # XLA takes its number of threads from the cores that it may run on.
    os.sched_setaffinity(0, list(os.sched_getaffinity(0))[:threads])
    warnings.simplefilter("ignore")
    if name != "jax":
        import torch

        torch.set_num_threads(threads)
    x, g = np.load(folder / "x.npy"), np.load(folder / "g.npy")
    run, named = {"ours": ours, "transformers": transformers, "jax": jax}[name](
        x, g, dict(np.load(folder / "weights.npz"))
    )
    first = True
    for _ in sys.stdin:
        if not first:
            run()  # not counted: another process has had the processor and its caches
        before = resident("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        wall, cpu = time.perf_counter(), processor()
        found = run()
        wall, cpu = time.perf_counter() - wall, processor() - cpu
        peak = resident("VmHWM") - before
        if first:
            np.savez(folder / f"{name}.npz", **{key: np.asarray(value) for key, value in named(found).items()})
        del found
        first = False
        print(wall, cpu, peak, flush=True)


if __name__ == "__main__":
    main()
