"""OLMo 2 and 3 for ONNX Runtime GenAI's builder, which has no class for them.

They norm what attention and MLP give before it is added, read the sum itself without a norm, and norm queries
and keys over all heads at once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from onnxruntime_genai.models import builder


class Olmo2Model(builder.Model):
    """A model whose layers are x + norm(attention(x)), then x + norm(mlp(x))."""

    def make_attention_init(self, config: Any) -> None:
        """Say that queries and keys are normed."""
        self.attention_attrs["q_norm"] = self.attention_attrs["k_norm"] = True
        super().make_attention_init(config)

    def is_fused_qk_norm_gqa_supported(self) -> bool:
        """Keep the norms out of the attention's node, which would norm each head."""
        return False

    def make_qk_norm(self, layer_id: int, attention: Any) -> None:
        """Norm queries and keys, [batch, tokens, heads * head size], over all heads."""
        for leaf, width in (("q", self.q_size), ("k", self.kv_size)):
            name = f"/model/layers.{layer_id}/attn/{leaf}_norm/SimplifiedLayerNormalization"
            weight = f"model.layers.{layer_id}.attn.{leaf}_norm.layernorm.weight"
            norm, output = getattr(attention, f"{leaf}_norm"), f"{name}/output_0"
            self.make_initializer(norm.weight, weight, to=self.io_dtype)
            self.make_node(
                "SimplifiedLayerNormalization",
                inputs=[self.attention_attrs[f"{leaf}_path"], weight],
                outputs=[output],
                name=name,
                epsilon=self.layernorm_attrs["epsilon"],
                axis=-1,
                stash_type=1,
            )
            self.make_value(output, self.io_dtype, self.make_hidden_state_shape(last_dim=width))
            self.attention_attrs[f"{leaf}_path"] = output

    def make_layer(self, layer_id: int, layer: Any) -> None:
        """Add the nodes of one layer."""
        self.make_block(
            layer_id,
            "post_attention",
            layer.post_attention_layernorm,
            lambda hidden: self.make_attention(layer_id, layer.self_attn, root_input=hidden),
        )
        self.make_block(
            layer_id,
            "post_feedforward",
            layer.post_feedforward_layernorm,
            lambda hidden: self.make_mlp(layer_id, layer.mlp, root_input=hidden),
        )
        # the builder's norm after the last layer adds the two that are left here
        self.layernorm_attrs["last_layernorm"] = layer_id == self.num_layers - 1

    def make_block(
        self, layer_id: int, location: str, norm: Any, make: Callable[[str], None]
    ) -> None:
        """Add what the block before gave to the hidden states; make a block that reads them, and its norm."""
        now = self.layernorm_attrs
        if not now["first_layernorm"]:
            name = f"/model/layers.{layer_id}/before_{location}/Add"
            given = [now["root_input"], now["skip_input"]]
            self.make_add(name, given, self.io_dtype, self.make_hidden_state_shape())
            now["root_input"] = f"{name}/output_0"
        now["first_layernorm"] = False
        hidden = now["root_input"]
        make(hidden)
        now["root_input"] = now["skip_input"]
        self.make_layernorm(layer_id, norm, skip=False, simple=True, location=location)
        now["root_input"], now["skip_input"] = hidden, now["output_0"]
