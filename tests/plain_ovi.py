"""The published model written out once more from its description, in the plainest way, in any one type.

Every token has its own modulation, every prompt its 512 rows, every rotation its complex numbers, and attention is a
softmax. Nothing is shared with ``ovi``: the weights come in published names. It says what the numbers should be
(float64) and how much rounding any straightforward program suffers (bfloat16).
"""

import torch
import torch.nn.functional as F


class PlainOvi:
    """Args: state: tensors in published names; video, audio: the reference's configurations; dtype: of everything."""

    def __init__(self, state, video, audio, dtype):
        self.state = {name: tensor.to(dtype) for name, tensor in state.items()}
        self.config, self.dtype = {"video": video, "audio": audio}, dtype

    def __call__(self, video, audio, timestep, video_texts, audio_texts, *, clean_first_frame=False, skip_layer=None):
        frames, rows, columns = video.shape[2], video.shape[3] // 2, video.shape[4] // 2
        kernel = self.state["video_model.patch_embedding.weight"]
        tokens = F.conv3d(
            video.to(self.dtype), kernel, self.state["video_model.patch_embedding.bias"], stride=(1, 2, 2)
        )
        x = {"video": tokens.flatten(2).transpose(1, 2)}
        x["audio"] = self.embed_audio(audio.to(self.dtype))
        grid = torch.cartesian_prod(*(torch.arange(n, dtype=torch.float64) for n in (frames, rows, columns)))
        places = (
            torch.arange(audio.shape[1], dtype=torch.float64) * self.config["audio"]["temporal_rope_scaling_factor"]
        )
        grids = {"video": grid, "audio": torch.stack([places, 0 * places, 0 * places], 1)}
        times, e, text = {}, {}, {}
        for name, texts in (("video", video_texts), ("audio", audio_texts)):
            t = timestep[:, None].expand(-1, x[name].shape[1]).clone().double()
            if clean_first_frame and name == "video":
                t[:, : rows * columns] = 0
            times[name], e[name] = self.embed_time(name, t)
            text[name] = self.embed_text(name, texts)
        for n in range(self.config["video"]["num_layers"]):
            if n != skip_layer:
                x = self.block(n, x, e, text, grids)
        v, a = (self.head(name, x[name], times[name]) for name in ("video", "audio"))
        v = v.unflatten(1, (frames, rows, columns)).unflatten(-1, (2, 2, -1))
        return torch.einsum("bfhwpqc->bcfhpwq", v).flatten(5, 6).flatten(3, 4), a

    def linear(self, name, x):
        return F.linear(x, self.state[f"{name}.weight"], self.state.get(f"{name}.bias"))

    def conv(self, name, x):
        weight = self.state[f"{name}.weight"]
        return F.conv1d(x, weight, self.state.get(f"{name}.bias"), padding=weight.shape[-1] // 2)

    def embed_audio(self, latent):
        x = F.silu(self.conv("audio_model.patch_embedding.0", latent.transpose(1, 2)))
        w = "audio_model.patch_embedding.2.w"
        return self.conv(w + "2", F.silu(self.conv(w + "1", x)) * self.conv(w + "3", x)).transpose(1, 2)

    def embed_time(self, name, t):
        half = self.config[name]["freq_dim"] // 2
        angles = t[..., None] * 10000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
        x = torch.cat([angles.cos(), angles.sin()], -1).to(self.dtype)
        time = self.linear(f"{name}_model.time_embedding.2", F.silu(self.linear(f"{name}_model.time_embedding.0", x)))
        return time, self.linear(f"{name}_model.time_projection.1", F.silu(time)).unflatten(-1, (6, -1))

    def embed_text(self, name, texts):
        rows = self.config[name]["text_len"]
        padded = torch.stack([F.pad(t.to(self.dtype), (0, 0, 0, rows - len(t))) for t in texts])
        hidden = F.gelu(self.linear(f"{name}_model.text_embedding.0", padded), approximate="tanh")
        return self.linear(f"{name}_model.text_embedding.2", hidden)

    def block(self, n, x, e, text, grids):
        x = {name: self.attend_to_itself(name, n, x[name], e[name], grids[name]) for name in x}
        other = {"video": "audio", "audio": "video"}
        y = {}
        for name in x:
            p = f"{name}_model.blocks.{n}.cross_attn."
            q = self.heads(name, self.rms(p + "norm_q", self.linear(p + "q", self.affine_norm(name, n, x[name]))))
            k = self.heads(name, self.rms(p + "norm_k", self.linear(p + "k", text[name])))
            heard = self.attention(q, k, self.heads(name, self.linear(p + "v", text[name])))
            partner = x[other[name]]
            partner = F.layer_norm(
                partner, partner.shape[-1:], *(self.state[f"{p}pre_attn_norm_fusion.{w}"] for w in ("weight", "bias")),
                1e-6,
            )  # fmt: skip
            k = self.heads(name, self.rms(p + "norm_k_fusion", self.linear(p + "k_fusion", partner)))
            v = self.heads(name, self.linear(p + "v_fusion", partner))
            heard = heard + self.attention(self.rope(q, grids[name]), self.rope(k, grids[other[name]]), v)
            y[name] = x[name] + self.linear(p + "o", heard.transpose(1, 2).flatten(2))
        for name in y:
            p, m = f"{name}_model.blocks.{n}.ffn.", self.modulation(name, n, e[name])
            hidden = F.gelu(self.linear(p + "0", self.norm(y[name]) * (1 + m[4]) + m[3]), approximate="tanh")
            y[name] = y[name] + m[5] * self.linear(p + "2", hidden)
        return y

    def attend_to_itself(self, name, n, x, e, grid):
        p, m = f"{name}_model.blocks.{n}.self_attn.", self.modulation(name, n, e)
        y = self.norm(x) * (1 + m[1]) + m[0]
        q, k = (self.rope(self.heads(name, self.rms(f"{p}norm_{w}", self.linear(p + w, y))), grid) for w in "qk")
        heads = self.attention(q, k, self.heads(name, self.linear(p + "v", y)))
        return x + m[2] * self.linear(p + "o", heads.transpose(1, 2).flatten(2))

    def modulation(self, name, n, e):
        return (self.state[f"{name}_model.blocks.{n}.modulation.modulation"] + e).unbind(2)

    def affine_norm(self, name, n, x):
        p = f"{name}_model.blocks.{n}.norm3."
        return F.layer_norm(x, x.shape[-1:], self.state[p + "weight"], self.state[p + "bias"], 1e-6)

    def norm(self, x):
        return F.layer_norm(x, x.shape[-1:], eps=1e-6)

    def rms(self, name, x):
        return x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * self.state[f"{name}.weight"]

    def heads(self, name, x):
        return x.unflatten(-1, (self.config[name]["num_heads"], -1)).transpose(1, 2)

    def attention(self, q, k, v):
        return (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1) @ v

    def rope(self, x, grid):
        d = x.shape[-1]
        dims = (d - 4 * (d // 6), 2 * (d // 6), 2 * (d // 6))
        angles = [
            grid[:, i, None] * 10000.0 ** (-torch.arange(0, n, 2, dtype=torch.float64) / n) for i, n in enumerate(dims)
        ]
        angles = torch.cat(angles, -1)
        pairs = torch.view_as_complex(x.double().unflatten(-1, (-1, 2)).contiguous())
        return torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)).flatten(-2).to(x.dtype)

    def head(self, name, x, time):
        shift, scale = (self.state[f"{name}_model.head.modulation"] + time.unsqueeze(2)).unbind(2)
        return self.linear(f"{name}_model.head.head", self.norm(x) * (1 + scale) + shift)
