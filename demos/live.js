"use strict";
// A live page: it is told of every token by its server, and tells it of the budget and of the end.

let source = null;
const form = $("start");
const state = $("state");

async function tell(path, fields) {
  const answer = await fetch(path, { method: "POST", body: new URLSearchParams(fields) });
  if (!answer.ok) state.textContent = await answer.text();
  return answer.ok;
}

function running(now) {
  $("go").textContent = now ? "Start again" : "Start";
  $("stop").disabled = !now;
  document.body.classList.toggle("running", now);
}

function begin() {
  source?.close();
  tokens.length = 0;
  chosen = 0;
  text.replaceChildren();
  line = word = null;
  const asked = new FormData(form);
  prompt(asked.get("prompt"));
  state.textContent = "reading the prompt";
  const fields = new URLSearchParams(asked);
  if (liveBudget !== null) fields.set("budget", liveBudget);
  source = new EventSource(`events?${fields}`);
  running(true);
  source.addEventListener("head", (event) => {
    recording.prompt_tokens = JSON.parse(event.data).prompt_tokens;
    state.textContent = "generating";
  });
  source.addEventListener("token", (event) => {
    const place = addToken(JSON.parse(event.data));
    if (chosen === place - 1 || place === 0) choose(place, false);
    summarise();
  });
  source.addEventListener("done", (event) => {
    end(JSON.parse(event.data).end);
    finish("finished");
    $("keep").hidden = tokens.length === 0;
  });
  source.addEventListener("refused", (event) => finish(JSON.parse(event.data).error));
  // Without this a browser would connect again, and so begin again.
  source.onerror = () => source && finish("the server has gone");
}

function finish(said) {
  source?.close();
  source = null;
  state.textContent = said;
  running(false);
  summarise();
}

form.addEventListener("submit", (event) => {
  event.preventDefault();
  begin();
});
$("stop").addEventListener("click", () => tell("stop", {}));
async function moveTo(value) {
  liveBudget = value;
  summarise();
  if (await tell("budget", { mean: value === null ? "" : value })) state.textContent = `budget: ${budgetText()}`;
}
slider.addEventListener("input", () => {
  liveBudget = means[Number(slider.value)];
  summarise();
});
slider.addEventListener("change", () => moveTo(means[Number(slider.value)]));
$("as-recorded").addEventListener("click", () => moveTo(null));
running(false);
