"""The towers of the embedded model as graphs of OpenVINO, built from its weights without torch.

The image tower is EfficientNet-lite0 (Tan and Le, "EfficientNet", ICML 2019, without squeeze-and-excitation and with
ReLU6), the text tower is MiniLM-L6 (Wang et al., "MiniLM", NeurIPS 2020), a BERT. ``app/encoders/embedded_torch.py``
describes the two heads that join them.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from app.encoders.openvino_tower import import_openvino, reads_bytes

Weights = Mapping[str, np.ndarray]

# Of the first convolution of each block of EfficientNet-lite0 that is not pointwise.
_STRIDES = (1, 2, 1, 2, 1, 2, 1, 1, 1, 1, 1, 2, 1, 1, 1, 1)
_BATCH_NORM_EPS = 1e-3
_LAYER_NORM_EPS = 1e-12
_ATTENTION_HEADS = 12


def image_graph(
    weights: Weights, heads: Weights, joint_space: Mapping[str, Any], preprocessing: Mapping[str, Any]
) -> Any:
    """Return OpenVINO's model from uint8 images (n, h, w, 3) to the joint space (n, d).

    Args:
        weights: of the image tower and its classifier.
        heads: the arrays of the heads.
        joint_space: their numbers, as in config.json.
        preprocessing: ``size``, ``mean`` and ``std``, as in config.json.
    """
    ov = import_openvino()
    ops = _ops()
    size = preprocessing["size"]
    image = ops.parameter([-1, 3, size, size], ov.Type.f32)
    features = ops.reduce_mean(_efficient_net(ops, image, weights), [2, 3], keep_dims=False)
    blur_effect = weights["_fc.weight"] @ heads["blur_direction"]
    class_weight = weights["_fc.weight"] - np.outer(blur_effect, heads["blur_direction"])
    class_bias = weights["_fc.bias"] + blur_effect * heads["blur_offset"]
    top = ops.topk(
        ops.add(_linear(ops, features, class_weight), class_bias),
        np.int32(joint_space["top_k"]),
        axis=1,
        mode="max",
        sort="value",
    )
    probabilities = ops.softmax(ops.multiply(top.output(0), np.float32(joint_space["inverse_temperature"])), axis=1)
    concepts = ops.gather(_constant(heads["concepts"]), top.output(1), np.int32(0))
    semantic = ops.squeeze(_product(ops, ops.unsqueeze(probabilities, [1]), concepts), [1])
    roots = ops.subtract(ops.sqrt(ops.relu(features)), heads["feature_mean"])
    visual = _product(ops, roots, _constant(heads["visual_basis"]))
    graph = ov.Model([_join(ops, semantic, visual, joint_space["concept_share"])], [image], "embedded image tower")
    return reads_bytes(graph, preprocessing["mean"], preprocessing["std"])


def text_graph(weights: Weights, heads: Weights, class_weight: np.ndarray, joint_space: Mapping[str, Any]) -> Any:
    """Return OpenVINO's model from int64 token ids (k, length), padded with 0, to the joint space (k, d).

    Args:
        weights: of the text tower.
        heads: the arrays of the heads.
        class_weight: weights of the image tower's classifier (1000, f).
        joint_space: the numbers of the heads, as in config.json.
    """
    ov = import_openvino()
    ops = _ops()
    tokens = ops.parameter([-1, -1], ov.Type.i64)
    mask = ops.convert(ops.not_equal(tokens, np.int64(0)), "f32")  # (k, length)
    states = _bert(ops, tokens, mask, weights)
    sums = ops.squeeze(_product(ops, ops.unsqueeze(mask, [1]), states), [1])
    sentences = ops.divide(sums, ops.reduce_sum(mask, [1], keep_dims=True))
    centred = ops.subtract(_unit(ops, sentences), heads["text_mean"])
    semantic = _unit(ops, _product(ops, centred, _constant(heads["text_map"])))
    attention = ops.softmax(
        ops.multiply(_linear(ops, semantic, heads["keys"]), np.float32(joint_space["sharpness"])), axis=1
    )
    visual = ops.subtract(_product(ops, attention, _constant(_key_looks(heads, class_weight))), heads["look_centre"])
    return ov.Model([_join(ops, semantic, visual, joint_space["concept_share"])], [tokens], "embedded text tower")


def _ops() -> Any:
    from openvino import opset13  # noqa: PLC0415 - after `import_openvino`, which prevents its telemetry

    return opset13


def _constant(values: np.ndarray) -> Any:
    """Return a constant that shares the memory of an array; by default, OpenVINO turns arrays into lists of numbers."""
    return import_openvino().op.Constant(np.ascontiguousarray(values), shared_memory=True)


def _efficient_net(ops: Any, image: Any, weights: Weights) -> Any:
    """Return the last feature maps (n, 1280, 7, 7)."""
    maps = _convolve(ops, image, weights, "_conv_stem", "_bn0", stride=2)
    for block, stride in enumerate(_STRIDES):
        name, before = f"_blocks.{block}.", maps
        if f"{name}_expand_conv.weight" in weights:
            maps = _convolve(ops, maps, weights, f"{name}_expand_conv", f"{name}_bn0")
        maps = _convolve(ops, maps, weights, f"{name}_depthwise_conv", f"{name}_bn1", stride=stride, depthwise=True)
        maps = _convolve(ops, maps, weights, f"{name}_project_conv", f"{name}_bn2", relu=False)
        if stride == 1 and maps.get_output_partial_shape(0) == before.get_output_partial_shape(0):
            maps = ops.add(maps, before)
    return _convolve(ops, maps, weights, "_conv_head", "_bn1")


def _convolve(
    ops: Any,
    maps: Any,
    weights: Weights,
    convolution: str,
    norm: str,
    *,
    stride: int = 1,
    depthwise: bool = False,
    relu: bool = True,
) -> Any:
    """Convolve with TensorFlow's padding; batch normalisation is folded into the weights."""
    scale = weights[f"{norm}.weight"] / np.sqrt(weights[f"{norm}.running_var"] + _BATCH_NORM_EPS)
    kernel = weights[f"{convolution}.weight"] * scale[:, None, None, None]
    bias = weights[f"{norm}.bias"] - weights[f"{norm}.running_mean"] * scale
    convolve = ops.group_convolution if depthwise else ops.convolution
    result = convolve(
        maps,
        _constant(kernel[:, None] if depthwise else kernel),
        [stride] * 2,
        [0, 0],
        [0, 0],
        [1, 1],
        auto_pad="same_upper",
    )
    result = ops.add(result, bias[None, :, None, None])
    return ops.clamp(result, 0.0, 6.0) if relu else result


def _bert(ops: Any, tokens: Any, mask: Any, weights: Weights) -> Any:
    """Return the last hidden states (k, length, t)."""
    words = ops.gather(_constant(weights["embeddings.word_embeddings.weight"]), tokens, np.int32(0))
    length = ops.gather(ops.shape_of(tokens, "i64"), np.array([1], np.int64), np.int32(0))
    positions = ops.slice(
        _constant(weights["embeddings.position_embeddings.weight"]), np.array([0]), length, np.array([1]), np.array([0])
    )
    kinds = weights["embeddings.token_type_embeddings.weight"][0]
    states = _layer_norm(
        ops, ops.add(ops.add(words, ops.unsqueeze(positions, [0])), kinds), weights, "embeddings.LayerNorm"
    )
    # Minus a large number where a token is padding, for each text, head and query.
    padding = ops.unsqueeze(ops.multiply(ops.subtract(mask, np.float32(1)), np.float32(1e9)), [1, 2])
    layers = sum(name.endswith("attention.self.query.weight") for name in weights)
    for layer in range(layers):
        name = f"encoder.layer.{layer}."
        attended = _attention(ops, states, padding, weights, f"{name}attention.self.")
        attended = _dense(ops, attended, weights, f"{name}attention.output.dense")
        states = _layer_norm(ops, ops.add(attended, states), weights, f"{name}attention.output.LayerNorm")
        hidden = ops.gelu(_dense(ops, states, weights, f"{name}intermediate.dense"), "erf")
        hidden = _dense(ops, hidden, weights, f"{name}output.dense")
        states = _layer_norm(ops, ops.add(hidden, states), weights, f"{name}output.LayerNorm")
    return states


def _attention(ops: Any, states: Any, padding: Any, weights: Weights, name: str) -> Any:
    width = weights[f"{name}query.weight"].shape[0]
    by_head = np.array([0, 0, _ATTENTION_HEADS, width // _ATTENTION_HEADS])

    def heads(part: str) -> Any:
        return ops.transpose(
            ops.reshape(_dense(ops, states, weights, name + part), by_head, special_zero=True), [0, 2, 1, 3]
        )

    attended = ops.scaled_dot_product_attention(heads("query"), heads("key"), heads("value"), padding)
    return ops.reshape(ops.transpose(attended, [0, 2, 1, 3]), np.array([0, 0, width]), special_zero=True)


def _dense(ops: Any, values: Any, weights: Weights, name: str) -> Any:
    return ops.add(_linear(ops, values, weights[f"{name}.weight"]), weights[f"{name}.bias"])


def _product(ops: Any, left: Any, right: Any) -> Any:
    return ops.matmul(left, right, transpose_a=False, transpose_b=False)


def _linear(ops: Any, values: Any, weight: np.ndarray) -> Any:
    return ops.matmul(values, _constant(weight), transpose_a=False, transpose_b=True)


def _layer_norm(ops: Any, values: Any, weights: Weights, name: str) -> Any:
    normalised = ops.mvn(values, np.array([-1]), normalize_variance=True, eps=_LAYER_NORM_EPS, eps_mode="inside_sqrt")
    return ops.add(ops.multiply(normalised, weights[f"{name}.weight"]), weights[f"{name}.bias"])


def _unit(ops: Any, rows: Any) -> Any:
    return ops.normalize_l2(rows, np.array([1]), 1e-24, "max")


def _join(ops: Any, semantic: Any, visual: Any, concept_share: float) -> Any:
    """Concatenate the parts so that a cosine of the result is the weighted mean of the cosines of the parts."""
    return ops.concat(
        [
            ops.multiply(_unit(ops, semantic), np.float32(math.sqrt(concept_share))),
            ops.multiply(_unit(ops, visual), np.float32(math.sqrt(1 - concept_share))),
        ],
        1,
    )


def _key_looks(heads: Weights, class_weight: np.ndarray) -> np.ndarray:
    """Return the mean look (w, v) of the classes of each key word."""
    looks = (class_weight - class_weight.mean(axis=0)) @ heads["visual_basis"]
    sizes = heads["key_sizes"].astype(np.int64)
    starts = np.concatenate([[0], np.cumsum(sizes)[:-1]])
    means: np.ndarray = np.add.reduceat(looks[heads["key_classes"]], starts, axis=0) / sizes[:, None]
    return means.astype(np.float32)
