"""The planner: what training, serving and ingestion would take, before anything is started or paid. Pure Python; asks no network.

accelerators   what each device is capable of
shapes         what of a model decides its arithmetic and memory
layout         over which devices a model is spread, and what a step is
memory         bytes on the fullest device
step_time      seconds of a step
decoding       seconds of prompts and tokens
ingesting      seconds of text
calibration    shares of the makers' figures that are reached, and how far plans were off
footprint      hours as energy, water, carbon, money
training       a run on so many accelerators, or on the fewest
serving        replicas for so many users
needs          what a configuration asks for
arguments      the flags of `aifactory plan`
command        what they ask for
plan           its answer
tradeoff       the picture
"""
