"""Serves the page on which people vote: Gradio's components, and what each click does."""

import asyncio
import hmac
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from socket import socket
from typing import Any

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read by Gradio as it is imported

import gradio as gr
import uvicorn
from fastapi import FastAPI, Request, Response

from dpo_recipes.terminal import say, shown
from dpo_recipes.vote.booth import PLACES, Booth, draw
from dpo_recipes.vote.log import QUESTIONS, UNDO, VoteLog

HERE = Path(__file__).parent
BUTTONS = {
    "first": "Answer 1",
    "tie": "Tie",
    "both bad": "Both bad",
    "second": "Answer 2",
    "skip": "Skip",
    UNDO: "Undo",
}
HEADERS = {
    # A browser asks no other host, and no other page shows this one. Gradio compiles its templates in the browser.
    "Content-Security-Policy": "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
}
COLOURS = {  # of the page that asks for the password, which Gradio shows without the style sheet
    **{"body_background_fill": "#fbfaf7", "body_background_fill_dark": "#14171c"},
    **{"button_primary_background_fill": "#006ba8", "button_primary_background_fill_dark": "#006ba8"},
    **{"background_fill_secondary": "#fbfaf7", "background_fill_secondary_dark": "#14171c"},
}
WRONG_PASSWORD = 1.0  # seconds to the answer, so that nobody tries many


def serve(pairs: Sequence[Mapping[str, Any]], log: VoteLog, listener: socket, *, password: str | None) -> None:
    """Serves the page until the process gets a signal, which it raises again as KeyboardInterrupt."""
    host, port = listener.getsockname()[:2]
    host = f"[{host}]" if ":" in host else host
    app = build_app(Booth(pairs, log), password=password)
    config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=1)
    say(f"Vote at http://{host}:{port} (Ctrl-C ends it and writes the result)")
    uvicorn.Server(config).run(sockets=[listener])


def build_app(booth: Booth, *, password: str | None) -> FastAPI:
    """The application: Gradio's, which asks for name and password if there is one, without requests to other hosts."""
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)

    async def is_welcome(name: str, given: str) -> bool:
        if name.strip() and hmac.compare_digest(given.encode(), str(password).encode()):
            return True
        await asyncio.sleep(WRONG_PASSWORD)
        return False

    @app.middleware("http")
    async def add_headers(request: Request, call_next: Any) -> Response:
        response: Response = await call_next(request)
        response.headers.update(HEADERS)
        return response

    welcome = "Any name of your own, and the password that you were given."
    gr.mount_gradio_app(
        app,
        build_page(booth),
        "/",
        **({"auth": is_welcome, "auth_message": welcome} if password else {}),
        **dict.fromkeys(("run_history", "ssr_mode", "pwa", "mcp_server", "enable_monitoring"), False),
        footer_links=[],
        theme=gr.themes.Base(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]).set(**COLOURS),
        css=(HERE / "vote.css").read_text(encoding="utf-8"),
        head=f"<script>{(HERE / 'vote.js').read_text(encoding='utf-8')}</script>",
    )
    return app


def build_page(booth: Booth) -> gr.Blocks:
    """The components, and what each click does. A browser sends the pair that it shows, so no click is for another."""
    with gr.Blocks(title="Vote", analytics_enabled=False) as page:
        with gr.Column(elem_id="welcome") as welcome:
            gr.HTML("<h1>Which answer is better?</h1><p>Your name keeps your place, also after a pause.</p>")
            name = gr.Textbox(label="Your name", max_lines=1, max_length=60, autofocus=True, elem_id="name")
            start = gr.Button("Start", variant="primary", elem_id="start")
        with gr.Column(visible=False, elem_id="booth") as column:
            stage = gr.HTML(elem_id="stage")
            with gr.Column(elem_id="questions"):
                gr.HTML("<p>If you like, say more before you vote:</p>")
                kinds = [gr.Radio(PLACES, label=words) for words in QUESTIONS.values()]
            with gr.Row(elem_id="buttons"):
                buttons = {
                    choice: gr.Button(words, elem_id=f"vote-{choice.replace(' ', '-')}")
                    for choice, words in BUTTONS.items()
                }
        voter, pair = (gr.Textbox(visible="hidden", elem_id=each) for each in ("voter", "pair"))
        outputs = [welcome, column, stage, voter, pair, *kinds]
        quiet: dict[str, Any] = dict(outputs=outputs, queue=False, show_progress="hidden", api_visibility="private")

        def show(who: str) -> list[Any]:
            key = booth.next(who) if who else ""
            drawn = draw(booth, who, key) if who else ""
            return [gr.update(visible=not who), gr.update(visible=bool(who)), drawn, who, key, *[None] * len(kinds)]

        def enter(typed: str, request: gr.Request) -> list[Any]:
            return show(_voter(request.username or typed))

        def reload(request: gr.Request) -> Any:
            who = _voter(request.username or request.query_params.get("voter", ""))
            return show(who) if who else gr.skip()

        def click(choice: str) -> Any:
            def cast(request: gr.Request, who: str, key: str, *answered: str | None) -> list[Any]:
                who = _voter(request.username or who)
                if who:
                    booth.cast(who, key, choice, dict(zip(QUESTIONS, answered, strict=True)))
                return show(who)

            return cast

        page.load(reload, None, **quiet)
        for event in (start.click, name.submit):
            event(enter, name, **quiet).then(None, voter, js="keepVoter")
        for choice, button in buttons.items():
            button.click(click(choice), [voter, pair, *kinds], **quiet).then(None, None, js="showTop")
    return page


def _voter(name: str) -> str:
    return " ".join(shown(name).split())[:60]
