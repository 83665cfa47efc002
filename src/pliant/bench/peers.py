"""What others have for the same: one small adapter each, used if its package is installed.

An adapter gets our problem and computes it with the peer, from the same numbers and weights, in the layout that the
peer likes. Gradients of parameters are computed too, but only those that are called as ours are compared.
"""

import importlib
import importlib.util
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pliant.bench.work import Problem, Work, torch_work, weights_like


@dataclass(frozen=True)
class Peer:
    """Another way to compute one of our cases.

    Attributes:
        name: as it is printed.
        package: what has to be installed.
        case: name of our case.
        make: from our problem to its work; whatever it raises is told, and the peer gets no figures.
        without: a package that takes its place where it is installed.
    """

    name: str
    package: str
    case: str
    make: Callable[[Problem], Work]
    without: str = ""


def find_peers(peers: Iterable[Peer], cases: Iterable[str]) -> tuple[list[Peer], list[str]]:
    """The peers of some cases whose packages are installed, and the packages that are not."""
    wanted = set(cases)
    here = [peer for peer in peers if peer.case in wanted and not (peer.without and _installed(peer.without))]
    packages = dict.fromkeys(peer.package for peer in here)
    absent = [name for name in packages if not _installed(name)]
    return [peer for peer in here if peer.package not in absent], absent


def _installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def _turned(problem: Problem, run: Callable[..., Tensor]) -> Work:
    """`run` on our inputs with axes 1 and 2, time and heads or channels, the other way round; so is what it gives."""
    inputs = {name: x.detach().transpose(1, 2).contiguous() for name, x in problem.inputs.items()}
    work = torch_work(lambda: run(**inputs).transpose(1, 2), inputs)

    def both() -> dict[str, Tensor]:
        found = work.both()
        return {name: x if name == "y" else x.transpose(1, 2) for name, x in found.items()}

    return Work(work.forward, both, None, inputs)


def _accelerated_scan(problem: Problem) -> Work:
    scan = importlib.import_module("accelerated_scan.ref").scan  # the other forms need CUDA
    return _turned(problem, lambda a, u: scan(a, u))


def _mambapy_scan(problem: Problem) -> Work:
    scan = importlib.import_module("mambapy.mamba").MambaBlock.selective_scan
    x = problem.inputs
    # The method asks nothing of its object.
    return torch_work(lambda: scan(None, x["u"], x["dt"], x["A"], x["B"], x["C"], x["D"]), x)


def _xlstm_matrix(form: str) -> Callable[[Problem], Work]:
    def make(problem: Problem) -> Work:
        function = getattr(importlib.import_module("xlstm.blocks.mlstm.backends"), form)
        last = (..., None) if form.startswith("parallel") else (...,)

        def run(q: Tensor, k: Tensor, v: Tensor, input_gate: Tensor, forget_gate: Tensor) -> Tensor:
            chunk = math.gcd(q.shape[2], 64)  # it takes whole chunks only
            found = function(q, k, v, input_gate[last], forget_gate[last], chunk_size=chunk)
            return found[0] if isinstance(found, tuple) else found

        return _turned(problem, run)

    return make


def _transformers_matrix(problem: Problem) -> Work:
    theirs = importlib.import_module("transformers.models.xlstm.modeling_xlstm")

    def run(q: Tensor, k: Tensor, v: Tensor, input_gate: Tensor, forget_gate: Tensor) -> Tensor:
        return theirs.wrap_chunkwise_pad_zeros(
            theirs.mlstm_chunkwise_native_autograd, query=q, key=k, value=v, igate=input_gate, fgate=forget_gate,
            autocast_kernel_dtype=torch.float32,
        )  # fmt: skip

    return _turned(problem, run)


def _weights(problem: Problem, names: Mapping[str, str]) -> dict[str, Tensor]:
    """Our parameters by their names."""
    assert problem.module is not None
    ours = {name: p.detach() for name, p in problem.module.named_parameters()}
    return {theirs: ours[name] for name, theirs in names.items()}


def _layer(problem: Problem, layer: nn.Module, weights: Mapping[str, Tensor], call: Callable[[Tensor], Tensor]) -> Work:
    """A layer of torch with our weights, and its gradients with regard to x and all parameters."""
    layer.load_state_dict(dict(weights), strict=True)
    x = problem.inputs["x"]
    parameters = {f"theirs.{name}": p for name, p in layer.named_parameters()}
    return torch_work(lambda: call(x), {"x": x, **parameters})


RECURRENTGEMMA = {
    f"{ours}.{part}": f"{theirs}{join}{part}"
    for ours, theirs, join in (("linear_x", "linear_x", "."), ("linear_y", "linear_y", "."),
                               ("linear_out", "linear_out", "."), ("lru.input_gate", "rg_lru.input_gate", "_"),
                               ("lru.decay_gate", "rg_lru.recurrent_gate", "_"))
    for part in ("weight", "bias")
} | {"conv_weight": "conv_1d.weight", "conv_bias": "conv_1d.bias", "lru.decay": "rg_lru.recurrent_param"}  # fmt: skip


def _transformers_recurrentgemma(problem: Problem) -> Work:
    make_config = importlib.import_module("transformers").RecurrentGemmaConfig
    theirs = importlib.import_module("transformers.models.recurrent_gemma.modeling_recurrent_gemma")
    weights = _weights(problem, RECURRENTGEMMA)
    weights["conv_1d.weight"] = weights["conv_1d.weight"].T[:, None]
    x = problem.inputs["x"]
    config = make_config(
        hidden_size=x.shape[2], lru_width=x.shape[2], num_attention_heads=len(weights["rg_lru.input_gate_bias"])
    )
    block = theirs.RecurrentGemmaRecurrentBlock(config, 0)
    positions = torch.arange(x.shape[1]).expand(x.shape[:2])
    return _layer(problem, block, weights, lambda x: block(x, positions, None, use_cache=False)[0])


XLSTM_MATRIX = {
    "linear_up.weight": "proj_up.weight", "conv_weight": "conv1d.conv.weight", "conv_bias": "conv1d.conv.bias",
    "query": "q_proj.weight", "key": "k_proj.weight", "value": "v_proj.weight",
    "input_gate.weight": "mlstm_cell.igate.weight", "input_gate.bias": "mlstm_cell.igate.bias",
    "forget_gate.weight": "mlstm_cell.fgate.weight", "forget_gate.bias": "mlstm_cell.fgate.bias",
    "norm_weight": "mlstm_cell.outnorm.weight", "skip": "learnable_skip", "linear_down.weight": "proj_down.weight",
}  # fmt: skip


def _xlstm_mlstm(problem: Problem) -> Work:
    layers = importlib.import_module("xlstm.blocks.mlstm.layer")
    weights = _weights(problem, XLSTM_MATRIX)
    weights["conv1d.conv.weight"] = weights["conv1d.conv.weight"].T[:, None]
    weights["mlstm_cell.outnorm.weight"] = weights["mlstm_cell.outnorm.weight"] - 1
    x = problem.inputs["x"]
    layer = layers.mLSTMLayer(layers.mLSTMLayerConfig(
        embedding_dim=x.shape[2], num_heads=len(weights["mlstm_cell.igate.bias"]), context_length=x.shape[1]
    ))  # fmt: skip
    weights = {**{name: buffer for name, buffer in layer.state_dict().items() if name not in weights}, **weights}
    return _layer(problem, layer, weights, layer)


def _xlstm_slstm(problem: Problem) -> Work:
    layers = importlib.import_module("xlstm.blocks.slstm.layer")
    assert problem.module is not None
    ours = {name: p.detach() for name, p in problem.module.named_parameters()}
    heads, size = ours["recurrent"].shape[:2]
    layer = layers.sLSTMLayer(layers.sLSTMLayerConfig(
        embedding_dim=heads * size, num_heads=heads, backend="vanilla", dtype="float32", _block_idx=0, _num_blocks=1
    ))  # fmt: skip
    weights = {
        "conv1d.conv.weight": ours["conv_weight"].T[:, None],
        "conv1d.conv.bias": ours["conv_bias"],
        "group_norm.weight": ours["norm_weight"] - 1,
        "slstm_cell._recurrent_kernel_": ours["recurrent"].reshape(heads, size, 4 * size).transpose(1, 2),
        "slstm_cell._bias_": ours["gate_bias"].flatten(),
    }
    # The first two are swapped there.
    for name, weight in zip(("fgate", "igate", "zgate", "ogate"), ours["gate_weight"], strict=True):
        weights[f"{name}.weight"] = weight.transpose(1, 2)
    return _layer(problem, layer, weights, layer)


MAMBA = {
    "linear_in.weight": "in_proj.weight", "conv_weight": "conv1d.weight", "conv_bias": "conv1d.bias",
    "linear_select.weight": "x_proj.weight", "linear_step.weight": "dt_proj.weight",
    "linear_step.bias": "dt_proj.bias", "log_rate": "A_log", "skip": "D", "linear_out.weight": "out_proj.weight",
}  # fmt: skip


def _mamba_sizes(weights: Mapping[str, Tensor]) -> tuple[int, int, int, int]:
    """N, taps, expansion, R."""
    channels, states = weights["A_log"].shape
    taps, width = weights["conv1d.weight"].shape[2], weights["out_proj.weight"].shape[0]
    return states, taps, channels // width, weights["dt_proj.weight"].shape[1]


def _mamba_weights(problem: Problem) -> dict[str, Tensor]:
    weights = _weights(problem, MAMBA)
    return {**weights, "conv1d.weight": weights["conv1d.weight"].T[:, None]}


def _mambapy_block(problem: Problem) -> Work:
    theirs = importlib.import_module("mambapy.mamba")
    weights = _mamba_weights(problem)
    states, taps, expand, rank = _mamba_sizes(weights)
    block = theirs.MambaBlock(theirs.MambaConfig(
        problem.inputs["x"].shape[2], 1, dt_rank=rank, d_state=states, expand_factor=expand, d_conv=taps
    ))  # fmt: skip
    return _layer(problem, block, weights, block)


def _transformers_mamba(problem: Problem) -> Work:
    make_config = importlib.import_module("transformers").MambaConfig
    theirs = importlib.import_module("transformers.models.mamba.modeling_mamba")
    weights = _mamba_weights(problem)
    states, taps, expand, rank = _mamba_sizes(weights)
    layer = theirs.MambaMixer(make_config(
        hidden_size=problem.inputs["x"].shape[2], state_size=states, expand=expand, conv_kernel=taps,
        time_step_rank=rank, num_hidden_layers=1,
    ), 0)  # fmt: skip
    return _layer(problem, layer, weights, layer)


def _jax_work(function: Callable[..., Any], inputs: Mapping[str, Any], names: Sequence[str]) -> Work:
    """The compiled `function(*inputs)`; gradients of the inputs `names` go by those names, others by none."""
    jax, jnp = (importlib.import_module(name) for name in ("jax", "jax.numpy"))
    arrays = list(inputs.values())
    y = jax.block_until_ready(jax.jit(function)(*arrays))
    weights = jnp.asarray(weights_like(torch.empty(y.shape)).numpy())

    def back(weights: Any, *arrays: Any) -> Any:
        y, pull = jax.vjp(function, *arrays)
        return y, pull(weights)

    forward = jax.jit(function).lower(*arrays).compile()
    compiled = jax.jit(back).lower(weights, *arrays).compile()

    def both() -> dict[str, Any]:
        y, grads = jax.block_until_ready(compiled(weights, *arrays))
        return {"y": y, **{f"d{name}": grad for name, grad in zip(inputs, grads, strict=True) if name in names}}

    return Work(lambda: jax.block_until_ready(forward(*arrays)), both, torch=False)


def _jax_arrays(inputs: Mapping[str, Tensor]) -> dict[str, Any]:
    jnp = importlib.import_module("jax.numpy")
    return {name: jnp.array(x.detach().numpy()) for name, x in inputs.items()}


def _jax_scan(problem: Problem) -> Work:
    jax, jnp = (importlib.import_module(name) for name in ("jax", "jax.numpy"))

    def run(a: Any, u: Any) -> Any:
        def step(h: Any, au: Any) -> Any:
            h = au[0] * h + au[1]
            return h, h

        _, h = jax.lax.scan(step, jnp.zeros_like(u[:, 0]), (a.swapaxes(0, 1), u.swapaxes(0, 1)))
        return h.swapaxes(0, 1)

    return _jax_work(run, _jax_arrays(problem.inputs), ("a", "u"))


def _jax_associative_scan(problem: Problem) -> Work:
    jax = importlib.import_module("jax")

    def join(one: Any, two: Any) -> Any:
        return one[0] * two[0], two[0] * one[1] + two[1]

    def run(a: Any, u: Any) -> Any:
        return jax.lax.associative_scan(join, (a, u), axis=1)[1]

    return _jax_work(run, _jax_arrays(problem.inputs), ("a", "u"))


def _jax_recurrentgemma(problem: Problem) -> Work:
    jnp = importlib.import_module("jax.numpy")
    modules = importlib.import_module("recurrentgemma.jax.modules")
    assert problem.module is not None
    ours = _jax_arrays(dict(problem.module.named_parameters()))
    x = problem.inputs["x"]
    block = modules.RecurrentBlock(width=x.shape[2], num_heads=ours["lru.input_gate.bias"].shape[0])
    positions = jnp.broadcast_to(jnp.arange(x.shape[1]), x.shape[:2])
    tree = {
        **{name: {"kernel": ours[f"{name}.weight"].T, "bias": ours[f"{name}.bias"]}
           for name in ("linear_x", "linear_y", "linear_out")},
        "conv_1d": {"w": ours["conv_weight"], "b": ours["conv_bias"]},
        "rg_lru": {
            "a_param": ours["lru.decay"],
            **{theirs: {"w": ours[f"lru.{name}.weight"], "b": ours[f"lru.{name}.bias"]}
               for name, theirs in (("input_gate", "input_gate"), ("decay_gate", "a_gate"))},
        },
    }  # fmt: skip

    def run(tree: Any, x: Any) -> Any:
        return block.apply({"params": tree}, x, positions, return_cache=False)[0]

    return _jax_work(run, {"tree": tree, **_jax_arrays({"x": x})}, ("x",))


PEERS = (
    Peer("JAX lax.scan", "jax", "linear_scan", _jax_scan),
    Peer("JAX associative_scan", "jax", "linear_scan", _jax_associative_scan),
    Peer("accelerated_scan ref", "accelerated_scan", "linear_scan", _accelerated_scan),
    Peer("mambapy", "mambapy", "selective_scan", _mambapy_scan),
    Peer("xlstm parallel", "xlstm", "matrix_memory", _xlstm_matrix("parallel_stabilized_simple")),
    Peer("xlstm chunkwise", "xlstm", "matrix_memory", _xlstm_matrix("chunkwise_simple")),
    Peer("transformers xLSTM chunkwise", "transformers", "matrix_memory", _transformers_matrix, without="xlstm"),
    Peer("transformers RecurrentGemma", "transformers", "GatedLRU", _transformers_recurrentgemma),
    Peer("recurrentgemma JAX", "recurrentgemma", "GatedLRU", _jax_recurrentgemma),
    Peer("mambapy", "mambapy", "S6", _mambapy_block),
    Peer("transformers Mamba", "transformers", "S6", _transformers_mamba),
    Peer("xlstm mLSTMLayer", "xlstm", "MLSTM", _xlstm_mlstm),
    Peer("xlstm sLSTMLayer vanilla", "xlstm", "SLSTM", _xlstm_slstm),
)
