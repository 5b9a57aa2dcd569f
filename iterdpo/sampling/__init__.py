"""Sampling from the policy: the protocol, the vLLM engine that implements it, and a pool of engines."""

from iterdpo.sampling.base import Sampler, SamplingParameters
from iterdpo.sampling.client import VLLMSampler
from iterdpo.sampling.pool import Pool

__all__ = ["Pool", "Sampler", "SamplingParameters", "VLLMSampler"]
