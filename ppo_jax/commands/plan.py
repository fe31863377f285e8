"""`ppo-jax plan`."""

import dataclasses
from pathlib import Path
from typing import Literal

import jax

from ppo_jax.commands.train import Adapters
from ppo_jax.distributed import meshes
from ppo_jax.errors import SettingError
from ppo_jax.plan import compile as plan
from ppo_jax.plan.memory import check_prompt, describe
from ppo_jax.ppo.settings import PPOConfig
from ppo_jax.run.files import write_json


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """Compile rollout, scoring and update for a TPU slice that is not here, and say what each chip would hold, do and send."""

    model: str
    """A folder, a Hugging Face id, a .gguf file, or a published size: gpt2-xl, llama3-8b, gpt3-13b, ...; no weights are read."""
    topology: str = "v5e:4x4"
    """Kind of chip and shape of the slice: v5e:4x4, v6e:8x8, v5p:4x4x4, v4:2x2x2."""
    mesh: str = ""
    """As in train: data=2,fsdp=4,tensor=2; by default all chips on data."""
    prompt_tokens: int = 64
    """Longest prompt."""
    critic: Literal["shared", "separate"] = "separate"
    """A value head on the policy's trunk, or a critic of its own."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Compute type; parameters are float32 always."""
    matmul_precision: Literal["default", "high", "highest"] = "default"
    """Of float32 matrix products: on a TPU default is one bfloat16 pass, high three, highest six, which is float32; on a GPU
    default may be TF32; a CPU always computes float32."""
    remat: bool = False
    """Recompute activations in the backward pass."""
    depths: tuple[int, int] | None = None
    """Compile the model with so many layers, twice, and take the figures further along a line: for models whose compilation asks
    too much of this machine (half a GiB of memory a layer)."""
    out: Path | None = None
    """Write the figures to this JSON file too."""
    lora: Adapters = dataclasses.field(default_factory=Adapters)
    ppo: PPOConfig = dataclasses.field(default_factory=PPOConfig)

    def __post_init__(self):
        if self.depths is not None and not 0 < self.depths[0] < self.depths[1]:
            raise SettingError(
                f"depths must be two numbers of layers, the smaller first, not {self.depths}."
            )

    def run(self) -> None:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_default_matmul_precision", self.matmul_precision)
        jax.config.update(
            "jax_enable_compilation_cache", False
        )  # what is compiled for another machine cannot be kept
        kind, config = describe(self.model, self.dtype, self.remat)
        check_prompt(self.prompt_tokens, self.ppo, config)
        if self.depths is not None and self.depths[1] > config.layers:
            raise SettingError(
                f"depths must lie within the model's {config.layers} layers, not be {self.depths}."
            )
        sizes = meshes.parse_mesh(self.mesh)
        devices = plan.make_topology(self.topology)
        mesh, chip = meshes.make_mesh(sizes, devices), plan.CHIPS[self.topology.partition(":")[0]]
        more = {
            "prompt_tokens": self.prompt_tokens,
            "critic": self.critic,
            "adapters": self.lora.settings(),
        }
        if self.depths is None:
            programs = plan.compile_iteration(config, self.ppo, mesh, chip, **more)
        else:
            programs = plan.extrapolate(config, self.depths, self.ppo, mesh, chip, **more)
        print(
            f"{self.model} ({kind}) on {self.topology}, {mesh.size} of {len(devices)} devices as "
            f"{','.join(f'{axis}={size}' for axis, size in mesh.shape.items())}; per device, of {chip.memory} GiB:"
        )
        for name, program in programs.items():
            print("\n".join(_lines(name, program, chip)))
        if whole := plan.undivided(config, mesh):
            print(
                f"tensor={mesh.shape['tensor']} does not divide {', '.join(whole)}; every chip computes these, beyond its share."
            )
        problems = plan.advice(programs, chip)
        print("It fits." if not problems else "It does not fit:\n  " + "\n  ".join(problems))
        if self.out is not None:
            write_json(
                self.out,
                {
                    "fits": not problems,
                    **{name: as_json(program) for name, program in programs.items()},
                },
            )


def _lines(name: str, program: plan.Program | plan.TooLarge, chip: plan.Chip) -> list[str]:
    if isinstance(program, plan.TooLarge):
        return [f"{name}: does not compile: {program}"]
    gib = lambda size: f"{size / 2**30:.3f} GiB"
    share = program.flops / (program.seconds * chip.peak * 1e12) if program.seconds else 0
    return [
        f"{name} (compiled in {program.compile_s:.0f} s)",
        f"  arguments {gib(program.arguments)}, temporary {gib(program.temporary)}, peak {gib(program.peak)}; "
        f"with all else on the chip {gib(program.needed)}",
        f"  {program.flops / 1e12:.3f} TFLOP, at most {gib(program.moved)} moved; the compiler's estimate {program.seconds:.3f} s "
        f"({share:.0%} of the chip's bfloat16 peak)",
        *(
            f"  {kind}: {c.count} of {gib(c.bytes)} together"
            for kind, c in sorted(program.collectives.items())
        ),
    ]


def as_json(program: plan.Program | plan.TooLarge) -> dict:
    if isinstance(program, plan.TooLarge):
        return {"too_large": str(program)}
    return {
        **program._asdict(),
        "collectives": {kind: c._asdict() for kind, c in program.collectives.items()},
    }
