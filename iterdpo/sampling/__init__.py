"""Sampling from the policy: the protocol, and the vLLM engine that implements it."""

from iterdpo.sampling.base import Sampler, SamplingParameters
from iterdpo.sampling.client import VLLMSampler

__all__ = ["Sampler", "SamplingParameters", "VLLMSampler"]
