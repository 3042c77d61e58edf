"""Serve the ONNX model and its adapters to OpenAI clients.

lab serve                                            # http://127.0.0.1:8000/v1, with the trained adapter
lab serve --adapter travel=a.onnx_adapter --adapter food=b.onnx_adapter
LAB_API_KEY=... lab serve --host 0.0.0.0
"""

from __future__ import annotations

import contextlib
import signal
import socket
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lab.models.chat import (
    AdapterFiles,
    Device,
    NoAdapter,
    OnnxFolder,
    check_alternatives,
    parse_adapters,
    takes_none,
)
from stages.core.errors import UserError

if TYPE_CHECKING:
    from lab.serve.api import Service

# options that `lab deploy` has too
MaxTokens = Annotated[
    int, typer.Option(min=1, help="Longest answer where a request says nothing, in tokens.")
]
Queue = Annotated[int, typer.Option(min=0, help="Requests that may wait besides.")]
DRAIN = 30  # seconds that running answers get after SIGTERM


def serve(
    adapter: AdapterFiles = None,
    no_adapter: NoAdapter = False,
    model: OnnxFolder = Path("models/onnx"),
    host: Annotated[str, typer.Option(help="The address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any that is free.")] = 8000,
    api_key: Annotated[
        str | None,
        typer.Option(envvar="LAB_API_KEY", help="What clients must send; needed beyond loopback."),
    ] = None,
    max_tokens: MaxTokens = 256,
    slots: Annotated[int, typer.Option(min=1, help="Answers made at once.")] = 8,
    queue: Queue = 16,
    keep: Annotated[
        int, typer.Option(min=0, help="Conversations whose keys and values are kept.")
    ] = 4,
    allow_loading: Annotated[
        bool, typer.Option("--allow-loading", help="Clients may load and unload adapters.")
    ] = False,
    behind_gateway: Annotated[
        bool,
        typer.Option(
            "--behind-gateway", help="No key beyond loopback: who asks is checked in front."
        ),
    ] = False,
    device: Device = None,
) -> None:
    """Serve the ONNX model to OpenAI clients. The base and each adapter are a model by name."""
    check_alternatives(adapter, no_adapter)
    if adapter and takes_none(model):
        raise UserError(f"{model} takes no adapter: leave --adapter out")
    adapters = {} if no_adapter or takes_none(model) else parse_adapters(adapter)
    need_packages()
    from lab.engine.models import Models
    from lab.engine.turns import Engine
    from lab.serve.api import Service, loopback  # takes half a second

    if not (api_key or behind_gateway or loopback(host)):
        raise UserError(f"--host {host} is open to others: set --api-key or LAB_API_KEY")
    with listening_socket(host, port) as listener:
        from lab.models.light_tokenizer import LightTokenizer
        from stages.text.chats import generation_prompt_ids

        models = Models(model, adapters, device=device)
        base = base_name(model)
        if base in adapters:
            raise UserError(f"--adapter {base}=…: that is the base model's name: choose another")
        shown = f"[{host}]" if ":" in host else host
        names = ", ".join([base, *adapters])
        url = f"http://{shown}:{listener.getsockname()[1]}/v1"
        tokenizer = LightTokenizer(model)
        with contextlib.suppress(UserError):  # what the first chat would wait for
            generation_prompt_ids(tokenizer, [{"role": "user", "content": "hello"}])
        service = Service(
            Engine(models, slots, queue, keep),
            tokenizer,
            base,
            max_tokens,
            api_key or None,
            allow_loading,
            behind_gateway=behind_gateway,
            on_ready=lambda: print(
                f"Serving {names} at {url}; a page to ask: {url.removesuffix('v1')}. Ctrl-C ends it.",
                flush=True,
            ),
        )
        # whoever reads the line may ask at once: uvicorn listens a moment after it says that it is ready
        listener.listen()
        run(service, listener)


def need_packages() -> None:
    """Raise `UserError` where the extra is not installed."""
    missing = [name for name in ("fastapi", "uvicorn") if find_spec(name) is None]
    if missing:
        raise UserError(
            f"lab serve needs {' and '.join(missing)}: `make setup` installs them, or "
            "`pip install -e '.[cpu,serve]'`"
        )


def listening_socket(host: str, port: int) -> socket.socket:
    """Take the port before the model is loaded: one that is taken is told at once."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise UserError(
            f"cannot listen on {host}, port {port} ({reason}): --port or --host"
        ) from None
    return listener


def base_name(folder: Path) -> str:
    """Return the base model's name as the graph has it, or else its folder's."""
    from stages.adapters.lora_inputs import BASE, load_graph

    with contextlib.suppress(UserError):
        if found := load_graph(folder).metadata_props.get(BASE):
            return str(found)
    return folder.resolve().name


def run(service: Service, listener: socket.socket) -> None:
    """Answer until SIGTERM or Ctrl-C, then finish what runs."""
    import uvicorn

    from lab.serve.api import make_app

    class Server(uvicorn.Server):
        def handle_exit(self, sig: int, frame: object) -> None:
            service.draining = True
            super().handle_exit(sig, frame)  # type: ignore[arg-type]

    # the thread with the generators must not wait 5 ms, a token's time, for this one to give way
    sys.setswitchinterval(0.0005)
    # uvicorn raises the signal once more when it is done: the exit code is to be 0
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)
    config = uvicorn.Config(
        make_app(service), log_level="warning", access_log=False, timeout_graceful_shutdown=DRAIN
    )
    try:
        Server(config).run(sockets=[listener])
    finally:
        service.engine.close()  # a second Ctrl-C ends the server without its own farewell
