"""CalibQuantCalibrateClip ("Calibrate Text Encoder"): what an encoder's layers see while prompts are encoded."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io, ui

from ..quant_core.models.modelfile import ModelFile
from .calibrate import Clock, kept, rows_input
from .comfyui import encoding, feedback, folders
from .prompts import NO_FILE, file_fingerprint, file_input, texts_of, varied_prompts
from .recorder import CalibrationHandle, Recorder, summary
from .types import CATEGORY, CalibrationType

FROM_CLIP = "the CLIP's file"


class CalibQuantCalibrateClip(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="CalibQuantCalibrateClip",
            display_name="Calibrate Text Encoder",
            category=CATEGORY,
            description="Encodes prompts and collects what each layer of a text encoder sees.",
            search_aliases=["calibration", "clip", "t5", "qwen", "activations", "statistics"],
            inputs=[
                io.Clip.Input("clip", tooltip="The 16-bit text encoder you want to quantize, from Load CLIP."),
                io.String.Input(
                    "prompts",
                    multiline=True,
                    default="",
                    tooltip="One prompt a line. Left empty: 64 varied prompts that ship with the pack.",
                ),
                rows_input(),
                file_input(),
                io.Combo.Input(
                    "model_name",
                    options=[FROM_CLIP, *folders.encoder_names()],
                    default=FROM_CLIP,
                    optional=True,
                    tooltip="The encoder's file. Choose it where the CLIP was loaded from several.",
                ),
            ],
            outputs=[CalibrationType.Output("calibration", tooltip="What all prompts together showed.")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def fingerprint_inputs(cls, file: str = NO_FILE, model_name: str = FROM_CLIP, **_: object) -> str:
        return f"{file_fingerprint(file)} {'' if model_name == FROM_CLIP else folders.fingerprint(model_name)}"

    @classmethod
    @feedback.in_node_words()
    def execute(
        cls, clip: Any, prompts: str, rows: int, file: str = NO_FILE, model_name: str = FROM_CLIP
    ) -> io.NodeOutput:
        texts = texts_of(prompts, file) or varied_prompts()
        path = encoding.the_file_of(clip) if model_name == FROM_CLIP else folders.model_path(model_name)
        with ModelFile(path) as source:
            encoder = encoding.find_encoder(clip, source)
            recorder = Recorder(folders.new_calibration_path(f"unfinished/{path.stem}"), patient=True)
            recorder.prepare(source.architecture, encoding.identity(source), rows)
        try:
            _encode_all(clip, encoder, texts, recorder, cls.hidden.unique_id)
        except BaseException:  # a cancel is no Exception; what finished prompts gave must not be lost
            recorder.save()
            feedback.tell_kept(cls.hidden.unique_id, kept(recorder, len(texts), "prompt"))
            raise
        collected = recorder.current()
        recorder.path.unlink(missing_ok=True)
        return io.NodeOutput(CalibrationHandle(lambda: collected), ui=ui.PreviewText(summary(collected)))


def _encode_all(
    clip: Any, encoder: encoding.Encoder, texts: list[str], recorder: Recorder, node_id: str | None
) -> None:
    """Every prompt is a run, so that roundings can be judged on prompts that they were not made with."""
    progress, clock = feedback.progress()(0), Clock(len(texts))
    for i, text in enumerate(texts):
        recorder.labels = {"prompts": text, "patched_tensors": len(clip.patcher.patches)}
        collector = recorder.start()
        collector.model_call(None, None)
        try:
            with encoding.watching(encoder, collector):
                encoding.encode(clip, text)
            recorder.finish()
        except BaseException:
            recorder.drop()
            raise
        progress(i + 1, len(texts), "")
        words = f"prompt {i + 1} of {len(texts)}"
        clock.tell(i + 1, lambda left, words=words, text=text: feedback.show(node_id, f"{words} · {left}\n{text}"))
