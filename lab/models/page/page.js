/* The page around model.js: what is typed goes to the model in this browser, and nowhere else. */
import { load } from "./model.js";

const at = (id) => document.getElementById(id);
const question = at("question");
let model = null;
let running = null;  // an AbortController while an answer is made

/** Return a new element; what it says is put in as text, never as HTML. */
function make(kind, name, text, parent) {
  const element = document.createElement(kind);
  element.className = name;
  element.textContent = text;
  parent.append(element);
  return element;
}

/** Change the page; who looks at its end goes on looking at its end. */
function grow(change) {
  const low = innerHeight + scrollY >= document.body.scrollHeight - 40;
  change();
  if (low) scrollTo(0, document.body.scrollHeight);
}

function trouble(message) {
  at("trouble").textContent = message;
  at("trouble").hidden = !message;
}

/** Return an error in one line of words. */
function plain(error) {
  return String(error?.message ?? error).split(/\s+/).join(" ").slice(0, 300);
}

async function start() {
  trouble("");
  at("progress").hidden = false;
  at("device").textContent = "The model is read.";
  try {
    model = await load((ratio) => {
      at("progress").value = ratio;
      if (ratio >= 1) at("device").textContent = "The model is made ready.";
    });
  } catch (error) {
    at("device").textContent = "";
    return trouble(plain(error));
  } finally {
    at("progress").hidden = true;
  }
  at("name").textContent = document.title = `Ask ${model.name}`;
  at("device").textContent = `Computed with ${model.device}.`;
  at("send").disabled = false;
}

async function ask() {
  const asked = question.value.trim();
  if (!model || running || !asked) return;
  trouble("");
  question.value = "";
  at("empty").hidden = true;
  const turn = make("section", "", "", at("turns"));
  make("h2", "", asked, turn);
  const card = make("article", "", "", turn);
  card.setAttribute("aria-label", "Answer");
  const text = make("p", "text", "", card);
  text.setAttribute("aria-live", "polite");
  text.setAttribute("aria-busy", "true");
  scrollTo(0, document.body.scrollHeight);
  running = new AbortController();
  at("send").disabled = true;
  at("stop").disabled = false;
  at("status").textContent = "Answering.";
  const notes = [], begin = performance.now();
  let first = null, last = null, count = 0, soFar = "", cut = false, problem = "";
  try {
    for await (const step of model.answer(asked, running.signal)) {
      last = performance.now();
      first ??= last;
      count = step.tokens.length;
      ({text: soFar, cut} = step);
      grow(() => { text.textContent = soFar.replace(/\uFFFD+$/, ""); });  // the rest of a letter is to come
    }
    grow(() => { text.textContent = soFar; });
  } catch (error) {
    problem = plain(error);
  }
  text.setAttribute("aria-busy", "false");
  if (count > 1) notes.push(`${((count - 1) / (last - first) * 1000).toFixed(1)} tokens/s`);
  if (count) notes.push(`first token after ${Math.round(first - begin)} ms`, `${count} ${count === 1 ? "token" : "tokens"}`);
  if (running.signal.aborted) notes.push("stopped");
  else if (cut) notes.push("cut at its longest");
  else if (!soFar && !problem) notes.push("an empty answer");
  grow(() => {
    if (problem) make("p", "wrong", problem, card).setAttribute("role", "alert");
    make("p", "speed quiet", notes.join(" · "), card);
  });
  at("status").textContent = running.signal.aborted ? "Stopped." : "The answer is there.";
  const focus = document.activeElement === at("stop");
  running = null;
  at("send").disabled = false;
  at("stop").disabled = true;
  if (focus) question.focus();
}

function stop() {
  running?.abort();
}

at("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  ask();
});
question.addEventListener("keydown", (event) => {
  // while an input method composes a word, Enter takes the word
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  ask();
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") stop();
});
at("stop").addEventListener("click", stop);
start();
