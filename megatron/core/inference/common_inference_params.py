"""The former name of `SamplingParams`."""

from megatron.core.inference.sampling_params import SamplingParams as CommonInferenceParams

__all__ = ["CommonInferenceParams"]
