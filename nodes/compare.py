"""CalibQuantCompare: what a quantized model draws beside the original, in pictures, figures and one sentence."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from comfy_api.latest import io

from ..quant_core.errors import CalibQuantError
from ..quant_core.evidence import likeness
from ..quant_core.files.header import Headers
from ..quant_core.files.markers import provenance
from ..quant_core.reports import likeness as reports
from ..quant_core.reports import sheet
from ..quant_core.reports.likeness import Comparison, Likeness, Picture
from .calibrate import (
    SWITCH,
    Clock,
    Job,
    check_negative,
    negative_input,
    prompts_input,
    prompts_of,
    sampler_inputs,
    switch_input,
)
from .comfyui import comparing, feedback, folders, patches, sampling, written
from .comfyui.sampling import SamplerSettings, Stages
from .types import CATEGORY

if TYPE_CHECKING:
    from PIL import Image

NO_VAE = "no VAE is linked"
OTHER_SEEDS = 4  # prompts whose first two seeds are compared, to read the figures by


class CalibQuantCompare(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="CalibQuantCompare",
            display_name="Compare Models",
            category=CATEGORY,
            description="Draws the same prompts from the same noise with two models and says what the second lost: "
            "side by side, in figures, and in one sentence.",
            search_aliases=["quality", "benchmark", "side by side", "psnr", "ssim", "lpips", "difference"],
            is_output_node=True,
            inputs=[
                io.Model.Input("model_a", tooltip="The 16-bit original."),
                io.Model.Input("model_b", tooltip="The quantized copy, with the same shift or LoRA nodes behind it."),
                prompts_input(),
                io.Int.Input("prompts", default=4, min=1, max=4096, tooltip="Of the prompt set, from its first."),
                io.Int.Input("seeds", default=2, min=1, max=1024, tooltip="Pictures of each prompt."),
                *sampler_inputs("First seed; the next ones count up. Take others than the calibration's."),
                io.String.Input(
                    "filename_prefix",
                    default="compare",
                    tooltip="Below output/comparisons: the sheet, the report as a page and as JSON. A number is "
                    "appended; nothing is overwritten.",
                ),
                io.Vae.Input(
                    "vae",
                    optional=True,
                    tooltip="Decodes the pictures. Without it only latents are compared, and shown in rough colours.",
                ),
                negative_input(),
                io.Model.Input(
                    "low_noise_a",
                    optional=True,
                    tooltip="Of an expert pair (Wan 2.2): the 16-bit model of the later steps, after model_a.",
                ),
                io.Model.Input("low_noise_b", optional=True, tooltip="Its quantized copy, or once more the original."),
                switch_input("low_noise_a"),
            ],
            outputs=[
                io.Image.Output("sheet", tooltip="Original, quantized and difference, row by row."),
                io.String.Output("report", tooltip="The whole report as markdown."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def fingerprint_inputs(cls, **_: object) -> int:
        return written.times_lost(cls.hidden.unique_id)

    @classmethod
    @feedback.in_node_words()
    def execute(
        cls, model_a: Any, model_b: Any, conditioning: list[Any], prompts: int, seeds: int, steps: int, cfg: float,
        sampler_name: str, scheduler: str, width: int, height: int, frames: int, seed: int, filename_prefix: str,
        vae: Any = None, negative: Any = None, low_noise_a: Any = None, low_noise_b: Any = None,
        switch_at_step: int = SWITCH,
    ) -> io.NodeOutput:  # fmt: skip
        began = time.monotonic()
        check_negative(cfg, negative)
        settings = SamplerSettings(steps, cfg, sampler_name, scheduler)
        sampling.check_pair(model_a, model_b, settings)
        if (low_noise_a is None) != (low_noise_b is None):
            raise CalibQuantError("an expert pair is drawn by both or by neither: link low_noise_a and low_noise_b")
        source = sampling.stages(model_a, low_noise_a, switch_at_step, settings)
        output = sampling.stages(model_b, low_noise_b, switch_at_step, settings)
        folders.new_comparison_path(filename_prefix)  # a name that cannot be is told before the work
        jobs = [(*prompt, seed + i) for prompt in prompts_of(conditioning)[:prompts] for i in range(seeds)]
        latent = sampling.empty_latent(model_a, width, height, frames)
        drawing = _Drawing(jobs, seeds, negative, latent, settings, cls.hidden.unique_id)
        drawing.draw(source, output)
        judge = _Judge(model_a, vae)
        pictures, rows = _judged(drawing, judge)
        words = _settings(settings, width, height, frames, seed, seeds, len(jobs) // seeds)
        words |= {"switch at step": switch_at_step} if low_noise_a is not None else {}
        found = Comparison(
            *_files(source, output),
            seconds=time.monotonic() - began,
            settings=words,
            pictures=pictures,
            same_seed=[judge.likeness(drawing.again[0], drawing.first[0])],
            other_seed=[judge.likeness(a, b) for a, b in drawing.other_seeds()],
            steps=reports.average(drawing.matched.errors),
            pace=drawing.pace,
            missing=judge.missing,
            notes=_notes(model_a, vae),
        )
        image = sheet.draw(rows, found.verdict(), _columns(found), _footing(found, len(rows), vae))
        return _saved(folders.new_comparison_path(filename_prefix), found, image, cls.hidden.unique_id)


@dataclass
class _Drawing:
    """Everything both models draw; final latents stay on the CPU."""

    jobs: list[Job]
    seeds: int
    negative: Any
    latent: torch.Tensor
    settings: SamplerSettings
    node_id: str | None
    first: list[torch.Tensor] = field(default_factory=list)  # by model_a, in the order of jobs
    second: list[torch.Tensor] = field(default_factory=list)  # by model_b
    again: list[torch.Tensor] = field(default_factory=list)  # the first job once more, by model_a
    other: list[torch.Tensor] = field(default_factory=list)  # its next seed, if no job has it
    matched: comparing.Matched = field(default_factory=comparing.Matched)
    pace: dict[str, reports.Pace] = field(default_factory=dict)

    def __post_init__(self) -> None:
        draws = 2 * len(self.jobs) + 1 + (self.seeds == 1)
        self._total = draws * self.settings.steps + len(self.jobs)  # a unit for a step, and for judging a picture
        self._done, self._clock = 0, Clock(self._total)
        self._progress = feedback.preview_progress(self._total)

    def draw(self, model_a: Stages, model_b: Stages) -> None:
        """One model after the other, so that short memory is filled twice only."""
        source, output = comparing.Watched(model_a), comparing.Watched(model_b)
        for i, job in enumerate(self.jobs):
            self.first.append(self._sample(source, job, "model_a", i, self.matched.record(i)))
        text, positive, seed = self.jobs[0]
        self.again.append(self._sample(source, self.jobs[0], "model_a, once more", 0))
        if self.seeds == 1:
            self.other.append(self._sample(source, (text, positive, seed + 1), "model_a, another seed", 0))
        for i, job in enumerate(self.jobs):
            self.second.append(self._sample(output, job, "model_b", i, self.matched.compare(i)))
        self.pace = {"source": source.pace(self.settings.steps), "output": output.pace(self.settings.steps)}

    def other_seeds(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Pairs of the original's latents, of one prompt and two seeds."""
        if self.other:
            return [(self.other[0], self.first[0])]
        firsts = range(0, len(self.jobs), self.seeds)
        return [(self.first[i + 1], self.first[i]) for i in firsts][:OTHER_SEEDS]

    def judged(self) -> None:
        self._advance(1, None, "measuring pictures")

    def _sample(
        self, watched: comparing.Watched, job: Job, who: str, number: int, observer: comparing.Observer | None = None
    ) -> torch.Tensor:
        text, positive, seed = job
        watched.begin(observer)
        begun = self._done

        def step(done: int, of: int, preview: Any) -> None:
            self._advance(
                begun + self.settings.steps * done // of - self._done,
                preview,
                f"{who}: picture {number + 1} of {len(self.jobs)}\n{text}",
            )

        # At cfg 1 the negative prompt is not evaluated; the sampler wants one all the same.
        final = sampling.draw(
            watched.stages, positive, self.negative or positive, self.latent, self.settings, seed, step
        ).cpu()
        if not final.isfinite().all():
            raise CalibQuantError(f"{who} draws NaN at seed {seed}, no picture: load it in another dtype")
        return final

    def _advance(self, by: int, preview: Any, text: str) -> None:
        self._done += by
        self._progress(self._done, preview)
        head, _, rest = text.partition("\n")
        self._clock.tell(self._done, lambda left: feedback.show(self.node_id, f"{head} · {left}\n{rest}".strip()))


class _Judge:
    """Measures pairs of latents, and their pictures where a VAE is linked."""

    def __init__(self, model: Any, vae: Any) -> None:
        self._model, self._vae = model, vae
        self._lpips, no_lpips = likeness.lpips() if vae is not None else (None, NO_VAE)
        self.missing = {"psnr": NO_VAE, "ssim": NO_VAE, "lpips": NO_VAE} if vae is None else {}
        if no_lpips:
            self.missing["lpips"] = no_lpips

    def error(self, found: torch.Tensor, wanted: torch.Tensor) -> float:
        return likeness.relative_error(*(comparing.in_model_space(self._model, one) for one in (found, wanted)))

    def pictures(self, latent: torch.Tensor) -> torch.Tensor:
        if self._vae is None:
            return comparing.rough_pictures(self._model, latent)
        return comparing.decode(self._vae, latent)

    def likeness(self, found: torch.Tensor, wanted: torch.Tensor) -> Likeness:
        return self.pair(found, wanted)[0]

    def pair(self, found: torch.Tensor, wanted: torch.Tensor) -> tuple[Likeness, torch.Tensor, torch.Tensor]:
        """How alike they are, and the pictures of both."""
        b, a = self.pictures(found), self.pictures(wanted)
        return Likeness(self.error(found, wanted), *(() if self._vae is None else self._of_pictures(b, a))), b, a

    def _of_pictures(self, found: torch.Tensor, wanted: torch.Tensor) -> tuple[float, float | None, float | None]:
        if why := likeness.why_no_ssim(*found.shape[1:3]):
            self.missing["ssim"] = why
        ssim = None if "ssim" in self.missing else likeness.ssim(found, wanted)
        return likeness.psnr(found, wanted), ssim, self._lpips(found, wanted) if self._lpips else None


def _judged(drawing: _Drawing, judge: _Judge) -> tuple[list[Picture], list[sheet.Row]]:
    """Every picture measured; rows of those that are shown. One pair is decoded at a time."""
    errors = [judge.error(b, a) for b, a in zip(drawing.second, drawing.first, strict=True)]
    shown = sheet.chosen(errors)
    pictures, rows = [], []
    for i, (text, _, seed) in enumerate(drawing.jobs):
        drawing.judged()
        alike, b, a = judge.pair(drawing.second[i], drawing.first[i])
        pictures.append(Picture(**asdict(alike), number=i + 1, prompt=text, seed=seed))
        if i in shown:
            rows.append(sheet.Row(sheet.tiles(a, b), _captions(pictures[-1], len(a))))
    return pictures, rows


def _captions(picture: Picture, frames: int) -> tuple[str, ...]:
    parts = [f"#{picture.number}", f"seed {picture.seed}"]
    parts += [f"frames {', '.join(str(i + 1) for i in sheet.shown(frames))} of {frames}"] if frames > 1 else []
    parts += [f"SSIM {picture.ssim:.4f}"] if picture.ssim is not None else []
    parts += [f"PSNR {picture.psnr:.1f} dB"] if picture.psnr is not None else []
    parts += [f"LPIPS {picture.lpips:.4f}"] if picture.lpips is not None else []
    first = " · ".join([*parts, f"latent error {picture.latent_error:.2e}"])
    return (first, picture.prompt) if picture.prompt else (first,)


def _columns(found: Comparison) -> tuple[str, str, str]:
    return (
        f"original · {found.source}" if found.source else "original",
        f"quantized · {found.output}" if found.output else "quantized",
        f"difference × {sheet.GAIN}",
    )


def _footing(found: Comparison, rows: int, vae: Any) -> str:
    words = [f"{name} {value}" for name, value in found.settings.items()]
    if rows < len(found.pictures):
        words.insert(0, f"the {rows} worst of {len(found.pictures)} pictures")
    return " · ".join([*words, *([] if vae is not None else ["no VAE: latents in rough colours"])])


def _settings(
    settings: SamplerSettings, width: int, height: int, frames: int, seed: int, seeds: int, prompts: int
) -> dict[str, Any]:
    """What was drawn; ``frames`` for video only."""
    size = {"width": width, "height": height} | ({"frames": frames} if frames > 1 else {})
    return {"prompts": prompts, "seeds": seeds, "seed": seed, **size, **asdict(settings)}


def _files(model_a: Stages, model_b: Stages) -> tuple[str, str, str, str, int, int]:
    """Both files' names, the family, the second's recipe, both sizes; empty where a loader left no trace."""
    (source, before, _), (output, after, recipe) = (_of_stages(stages) for stages in (model_a, model_b))
    return source, output, patches.identify(model_a[0].model)[0].name, recipe, before, after


def _of_stages(stages: Stages) -> tuple[str, int, str]:
    """Name, size and recipe; of a pair both names and recipes, and the sum."""
    names, sizes, recipes = zip(*(_file(stage.model) for stage in stages), strict=True)
    name, recipe = (" + ".join(dict.fromkeys(filter(None, each))) for each in (names, recipes))
    return name, sum(sizes) if all(sizes) else 0, recipe


def _file(model: Any) -> tuple[str, int, str]:
    path = patches.path_of(model) or Path()
    try:
        with Headers(path) as file:
            return file.path.name, file.nbytes(), str((provenance(file) or {}).get("recipe", ""))
    except (CalibQuantError, OSError):  # no safetensors file, or gone
        return path.name, 0, ""


def _notes(model_a: Any, vae: Any) -> list[str]:
    notes = ["no VAE is linked: the sheet shows latents in rough colours"] if vae is None else []
    if patches.is_quantized(model_a):
        notes.append("model_a is quantized itself: figures tell how far the two are apart, not what was lost")
    return notes


def _saved(target: Path, found: Comparison, image: Image.Image, node_id: str | None) -> io.NodeOutput:
    """Three files of one name, the node's text and picture, and the figures as data."""
    png, page, data = (target.with_name(target.name + suffix) for suffix in (".png", ".md", ".json"))
    markdown, figures = found.to_markdown(png.name), found.to_json()
    reports.save({png: sheet.png(image), page: markdown.encode(), data: figures.encode()})
    written.remember(node_id, png, page, data)
    pixels = torch.from_numpy(np.asarray(image, dtype=np.float32) / 255)[None]
    shown = {
        "text": (f"{found.summary()}\nsaved as {folders.shown(page)}, .json and .png",),
        "images": [folders.output_image(png)],
        "calibquant_compare": [json.loads(figures)],
    }
    return io.NodeOutput(pixels, markdown, ui=shown)
