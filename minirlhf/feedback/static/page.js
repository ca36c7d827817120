// The page. Whatever people or models wrote enters it through textContent alone.
"use strict";

const $ = (id) => document.getElementById(id);
const QUESTION = { pair: "Which continuation is better?", rating: "How good is this text?" };
const GUIDELINES = "Judge the text itself, not what you think of its subject. Read all of it before you answer. If two texts are " +
  "equally good, say so; if neither is acceptable, say that. Skip what you cannot judge. Your first impression counts: " +
  "there is no right answer to find.";
// key -> [label, what is sent]; both modes are answered by 1 to 5 alike
const ANSWERS = {
  pair: {
    1: ["Left, much better", { choice: "left", strength: 2 }],
    2: ["Left", { choice: "left", strength: 1 }],
    3: ["Tie", { choice: "tie" }],
    4: ["Right", { choice: "right", strength: 1 }],
    5: ["Right, much better", { choice: "right", strength: 2 }],
    0: ["Both bad", { choice: "bad" }],
  },
  rating: Object.fromEntries(["very bad", "bad", "middling", "good", "very good"].map((word, i) => [i + 1, [word, { rating: i + 1 }]])),
};
const ALIASES = { ArrowLeft: "2", ArrowRight: "4", ArrowDown: "3", b: "0" };
const GUARD = 200; // ms: a key pressed sooner was meant for the item before

let csrf = "";
let item = null; // the item shown
let editing = false;
let pending = null; // [path, body] of a request that is not yet acknowledged: it is kept until it is
let sending = false;
let seconds = 0; // the item was in sight, up to `since`
let since = 0;
let shownAt = 0;

async function call(path, body) {
  const options = body && { method: "POST", body: JSON.stringify(body),
    headers: { "Content-Type": "application/json", "X-CSRF-Token": csrf } };
  const response = await fetch(path, { ...options, signal: AbortSignal.timeout(20000) });
  const found = await response.json().catch(() => ({ error: `the server answered ${response.status}` }));
  if (!response.ok) throw Object.assign(new Error(found.error), { status: response.status, why: found.why });
  return found;
}

// Send what changes something. What fails stays in `pending`, to be sent again as it was.
async function send(path, body) {
  if (sending) return;
  pending = [path, body];
  sending = true;
  document.body.classList.add("busy");
  try {
    const found = await call(path, body);
    pending = null;
    hideError();
    show(found, path === "/api/edit" || path === "/api/undo");
  } catch (error) {
    const [what, refused] = [pending[0], error.status >= 400 && error.status < 500];
    if (error.status === 401 || error.status === 403 && !error.why) await begin(false); // sign in, or a new CSRF token
    else if (refused) pending = null; // to send the same again would not help
    const lost = what === "/api/vote" && error.why !== "replayed";
    if (error.why && what === "/api/vote") { // the first sending did arrive, or the item is gone: go on with the next
      sending = false;
      await send("/api/next", {});
    }
    if (error.why !== "replayed") {
      const message = error.status ? error.message : "The server cannot be reached.";
      showError((lost ? "Your answer is NOT stored. " : "") + message, pending !== null);
    }
  } finally {
    sending = false;
    document.body.classList.remove("busy");
  }
}

function showError(message, retry) {
  $("error-text").textContent = message;
  $("retry").hidden = !retry;
  $("error").hidden = false;
}
const hideError = () => { $("error").hidden = true; };

function element(tag, text, attributes = {}) {
  const node = Object.assign(document.createElement(tag), attributes);
  node.textContent = text;
  return node;
}

function inWords(mode, answer) {
  if (answer.skip) return "skipped";
  const same = ([, sent]) => ["choice", "strength", "rating"].every((field) => sent[field] === answer[field]);
  const found = Object.values(ANSWERS[mode]).find(same);
  return (found ? found[0] : "") + (answer.rating ? ` (${answer.rating})` : "") + (answer.note ? `, "${answer.note}"` : "");
}

function show(found, changing) {
  item = found.item;
  editing = changing;
  for (const id of ["join", "history"]) $(id).hidden = true;
  $("item").hidden = !item;
  $("done").hidden = Boolean(item);
  const { done, left } = found.progress;
  $("bar").value = done / Math.max(1, done + left);
  $("count").textContent = `${done} done, ${left} left`;
  if (!item) return;
  $("question").textContent = QUESTION[item.mode];
  $("prompt").textContent = item.prompt;
  const names = item.mode === "pair" ? ["Left", "Right"] : ["Text"];
  $("texts").replaceChildren(...item.texts.map((text, i) => {
    const node = element("p", text, { className: "text", dir: "auto" });
    node.dataset.name = names[i];
    return node;
  }));
  $("previous").hidden = !item.previous;
  if (item.previous) $("previous").textContent = `You said: ${inWords(item.mode, item.previous)}`;
  $("answers").replaceChildren(...Object.entries(ANSWERS[item.mode]).map(([key, [label]]) => {
    const node = element("button", label + " ");
    node.append(element("kbd", key));
    node.dataset.key = key;
    node.classList.toggle("wide", key === "0");
    return node;
  }).sort((a, b) => a.dataset.key === "0" ? 1 : b.dataset.key === "0" ? -1 : 0));
  $("cancel").hidden = !editing;
  $("note").value = item.previous?.note ?? "";
  $("note-label").hidden = !$("note").value;
  seconds = 0;
  since = shownAt = performance.now();
  window.scrollTo(0, 0);
}

function answer(what) {
  const inSight = seconds + (document.hidden ? 0 : performance.now() - since);
  const note = $("note").value.trim();
  send("/api/vote", { item: item.item, lease: item.lease,
    answer: { ...what, seconds: inSight / 1000, ...(note && { note }) } });
}

async function toggleHistory() {
  if (!$("history").hidden) return void ($("history").hidden = true);
  let judged;
  try {
    ({ judged } = await call("/api/history"));
  } catch (error) {
    return showError(error.message, false);
  }
  $("judged").replaceChildren(...judged.map((row) => {
    const node = element("li", "");
    const change = element("button", `${inWords(row.mode, row.previous)}: ${row.prompt} ${row.texts.join(" | ")}`.slice(0, 200));
    change.onclick = () => { if (!pending) send("/api/edit", { item: row.item, repeat: row.repeat }); };
    node.append(change);
    return node;
  }));
  $("history").hidden = false;
}

function press(key) {
  key = ALIASES[key] ?? key;
  if (key === "g") return void ($("guidelines").hidden = !$("guidelines").hidden);
  if (key === "r" && pending) return send(...pending);
  if (pending || sending || !$("join").hidden) return;
  if (key === "h") return toggleHistory();
  if (key === "u") return send("/api/undo", {});
  if (key === "l" && !item) return send("/api/next", {});
  if (!item) return;
  if (key === "c" && editing) return send("/api/next", { release: true });
  if (key === "n") {
    $("note-label").hidden = false;
    return $("note").focus();
  }
  if (performance.now() - shownAt < GUARD) return;
  if (key === "s") return answer({ skip: true });
  if (Object.hasOwn(ANSWERS[item.mode], key)) return answer(ANSWERS[item.mode][key][1]);
}

// Ask who we are; go on with the next item if the server knows.
async function begin(go = true) {
  try {
    const me = await call("/api/me");
    csrf = me.csrf;
    $("token-label").hidden = !me.needs_token || Boolean($("token").value);
    $("join").hidden = Boolean(me.rater);
    if (!me.rater) {
      $("item").hidden = $("done").hidden = true;
      return $("name").focus();
    }
    $("who").textContent = me.rater;
    $("guidelines-text").textContent = me.guidelines || GUIDELINES;
    if (go) await send(...(pending ?? ["/api/next", {}]));
  } catch (error) {
    showError(error.status ? error.message : "The server cannot be reached: reload the page once it runs.", false);
  }
}

document.addEventListener("keydown", (event) => {
  if (event.target.matches("input, textarea")) {
    if (event.key === "Escape") event.target.blur();
    return;
  }
  if (event.repeat || event.ctrlKey || event.metaKey || event.altKey) return;
  const key = event.key.length === 1 ? event.key.toLowerCase() : event.key;
  if (key === "n" || key in ALIASES) event.preventDefault(); // neither type the n nor scroll
  press(key);
});
document.addEventListener("click", (event) => {
  const button = event.target.closest("button[data-key]");
  if (button) {
    button.blur(); // or the next Space would press it again
    press(button.dataset.key);
  }
});
document.addEventListener("visibilitychange", () => { // time out of sight does not count
  if (document.hidden) seconds += performance.now() - since;
  else since = performance.now();
});
window.addEventListener("beforeunload", (event) => { if (pending && pending[0] === "/api/vote") event.preventDefault(); });
$("show-guidelines").onclick = () => press("g");
$("show-history").onclick = () => press("h");
$("retry").onclick = () => press("r");
$("join").onsubmit = async (event) => {
  event.preventDefault();
  try {
    ({ csrf } = await call("/api/join", { name: $("name").value, token: $("token").value }));
    hideError();
    document.activeElement.blur();
    await begin();
  } catch (error) {
    showError(error.message, false);
  }
};
if (location.hash.length > 1) { // the token: out of sight and out of the history, never part of a request for a page
  $("token").value = decodeURIComponent(location.hash.slice(1));
  history.replaceState(null, "", location.pathname);
}
begin();
