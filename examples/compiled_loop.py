"""A decode loop of your own over a static cache: eager, compiled, or one captured CUDA graph.

    python examples/compiled_loop.py    # a tiny random Llama, on any machine
    python examples/compiled_loop.py --device cuda --mode compile --model ID_OR_PATH
    python examples/compiled_loop.py --device cuda --mode graph --model ID_OR_PATH

Every mode runs the prompt eagerly and then decodes greedily, and the tokens are compared with those
of ``model.generate`` on the same patched model; where a compiled step rounds otherwise, a model in
half precision may choose otherwise too. In the loop nothing reads the device: the length that a
static cache tells is a tensor, and the model makes the positions from it.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import fierpatch

Step = Callable[[Tensor], Tensor]  # a token [1, 1] to the next one [1, 1]

NUM_WARM_UPS = 5  # steps that compile, settle allocations and record, before any is timed


def main(arguments: list[str] | None = None) -> int:
    """Decode in the chosen mode; 0 if the tokens are those of ``model.generate``."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", help="id or path; without one, a tiny random Llama")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tokens", type=int, default=32, help="tokens to decode")
    parser.add_argument("--prompt-tokens", type=int, default=700, help="length of a random prompt")
    parser.add_argument("--budget", type=int, default=256, help="tokens attended in a step")
    parser.add_argument("--mode", choices=sorted(MODES), default="eager")
    options = parser.parse_args(arguments)
    if options.tokens < 2:
        parser.error("--tokens must be 2 or more: the first one comes from the prompt")
    if options.mode == "graph" and torch.device(options.device).type != "cuda":
        parser.error("--mode graph captures a CUDA graph: choose --device cuda or another mode")

    torch.manual_seed(0)
    model = load(options.model).to(options.device).eval()
    vocabulary = model.get_input_embeddings().num_embeddings
    prompt = torch.randint(vocabulary, (1, options.prompt_tokens)).to(options.device)
    handle = fierpatch.apply(model, budget=options.budget, compile=True)
    with torch.no_grad():
        tokens, milliseconds = decode(model, handle, prompt, options.tokens, MODES[options.mode])
        expected = generate(model, prompt, options.tokens)
    agrees = torch.equal(tokens, expected)
    print("tokens:", *tokens[0].tolist())
    print(f"{options.mode}: {milliseconds:.2f} ms a token")
    print("the tokens of model.generate" if agrees else f"model.generate: {expected[0].tolist()}")
    return 0 if agrees else 1


def load(name: str | None) -> Any:
    """The model of that name, or a tiny random Llama with weights wide enough to say something."""
    if name is not None:
        return AutoModelForCausalLM.from_pretrained(name, dtype="auto")
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=256,
            hidden_size=128,
            intermediate_size=256,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=4096,
            initializer_range=0.2,
        )
    )


def decode(
    model: Any,
    handle: fierpatch.Handle,
    prompt: Tensor,
    num_tokens: int,
    make_step: Callable[[Any, Any, Tensor], Step],
) -> tuple[Tensor, float]:
    """Tokens ``[1, num_tokens]`` that follow the prompt, and milliseconds a step."""
    # One cache for all: a graph is bound to the addresses it was captured with.
    cache = handle.new_cache(prompt.shape[1] + max(num_tokens, NUM_WARM_UPS + 1))
    first = prefill(model, cache, prompt)
    step = make_step(model, cache, first)  # compiles or captures, and leaves tokens of its own
    cache.reset()
    token = prefill(model, cache, prompt)
    chosen = [token]
    synchronize(prompt.device)
    start = time.perf_counter()
    for _ in range(num_tokens - 1):
        token = step(token)
        chosen.append(token)
    synchronize(prompt.device)
    return torch.cat(chosen, 1), 1000 * (time.perf_counter() - start) / (num_tokens - 1)


def prefill(model: Any, cache: fierpatch.FierCache, prompt: Tensor) -> Tensor:
    """Run the prompt, always eagerly, and choose the first token ``[1, 1]``."""
    logits = model(prompt, past_key_values=cache, logits_to_keep=1).logits
    return logits[:, -1:].argmax(-1)


def eager_step(model: Any, cache: fierpatch.FierCache, token: Tensor) -> Step:
    """A step as PyTorch runs it, operator by operator."""

    def step(token: Tensor) -> Tensor:
        return model(token, past_key_values=cache).logits.argmax(-1)

    return step


def compiled_step(model: Any, cache: fierpatch.FierCache, token: Tensor) -> Step:
    """A step as one compiled graph; on CUDA the compiler captures CUDA graphs of it itself."""
    mode = "reduce-overhead" if token.device.type == "cuda" else None
    forward = torch.compile(model.forward, mode=mode, fullgraph=True)

    def step(token: Tensor) -> Tensor:
        # The next replay writes where this one's output lies; argmax makes a tensor of its own.
        torch.compiler.cudagraph_mark_step_begin()
        return forward(token, past_key_values=cache).logits.argmax(-1)

    for _ in range(NUM_WARM_UPS):
        step(token)
    return step


def captured_step(model: Any, cache: fierpatch.FierCache, token: Tensor) -> Step:
    """An eager step, captured once with ``torch.cuda.graph`` and replayed for every token."""
    if any(cache.is_sliding):
        raise SystemExit(
            "a static sliding layer of transformers counts its tokens on the host, and a captured "
            "graph would repeat one count for ever: choose --mode compile for this model"
        )
    static_token = token.clone()  # the graph reads its input from here, and nowhere else

    def eager() -> Tensor:
        return model(static_token, past_key_values=cache).logits.argmax(-1)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(NUM_WARM_UPS):
            eager()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        static_output = eager()

    def step(token: Tensor) -> Tensor:
        static_token.copy_(token)
        graph.replay()
        return static_output.clone()  # which the next replay overwrites

    return step


def generate(model: Any, prompt: Tensor, num_tokens: int) -> Tensor:
    """What ``model.generate`` decodes, greedily, uncompiled, without stopping early."""
    output = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=num_tokens,
        do_sample=False,
        repetition_penalty=1.0,
        disable_compile=True,
        pad_token_id=0,
        eos_token_id=[],
    )
    return output[:, prompt.shape[1] :]


def synchronize(device: torch.device) -> None:
    """Wait for the device, where it runs on its own time."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


MODES: dict[str, Callable[[Any, Any, Tensor], Step]] = {
    "eager": eager_step,
    "compile": compiled_step,
    "graph": captured_step,
}

if __name__ == "__main__":
    sys.exit(main())
