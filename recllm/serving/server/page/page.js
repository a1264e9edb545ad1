// What the page does. Data of the service goes into the page as text only (textContent), never as markup.
"use strict";

const $ = (id) => document.getElementById(id);
const state = { user: null, history: [], removed: [], target: null };
const before = []; // states to go back to
let key = null;
let running = null; // the question whose answer is waited for
let finding = null;

// ---- elements

/** An element with text or elements in it; `options` are its properties, `class` and attributes among them. */
function element(name, options = {}, ...inside) {
  const made = document.createElement(name);
  for (const [option, value] of Object.entries(options)) {
    if (option === "class") made.className = value;
    else if (option in made) made[option] = value;
    else made.setAttribute(option, value);
  }
  made.append(...inside.filter((part) => part !== null && part !== undefined));
  return made;
}

/** A table; cells are texts, numbers, or elements; headings that begin with # are of numbers. */
function table(caption, headings, lines, words = "") {
  const isNumber = headings.map((heading) => heading.startsWith("#"));
  const head = headings.map((heading, place) =>
    element("th", { scope: "col", class: isNumber[place] ? "n" : "" }, heading.replace("#", "")));
  const body = lines.map((cells) => element("tr", {}, ...cells.map((cell, place) =>
    cell instanceof HTMLTableCellElement ? cell : element("td", { class: isNumber[place] ? "n" : "" }, cell ?? ""))));
  const title = element("caption", {}, caption, words ? element("span", {}, words) : null);
  return element("table", {}, title, element("thead", {}, element("tr", {}, ...head)), element("tbody", {}, ...body));
}

const show = (id, ...inside) => $(id).replaceChildren(...inside);
const named = (entry) => entry.title ?? `item ${entry.item}`;
const short = (value) => (value === null || value === undefined ? "" : value.toFixed(3));
const date = (second) => (second === null ? "" : new Date(1000 * second).toISOString().slice(0, 10));

function opinion(event) {
  if (event.rating !== null) return `rated ${event.rating}`;
  if (event.liked !== null) return event.liked ? "liked" : "not liked";
  return "";
}

// ---- the service

/** Asks the service; an answer that is none becomes an error with its sentence. */
async function fetchJson(address, body, signal) {
  const headers = body ? { "Content-Type": "application/json" } : {};
  if (key !== null) headers.Authorization = `Bearer ${key}`;
  const options = body ? { method: "POST", headers, body: JSON.stringify(body), signal } : { headers, signal };
  const response = await fetch(address, options);
  const answer = await response.json().catch(() => ({ error: `the service answered with status ${response.status}` }));
  if (response.status === 401) {
    $("key-form").hidden = false;
    $("key").focus();
  }
  if (!response.ok) {
    const error = new Error(answer.error ?? `the service answered with status ${response.status}`);
    error.isEarly = response.status === 503;
    throw error;
  }
  return answer;
}

function alertOf(error) {
  $("alert").textContent = error === null ? "" : `That cannot be shown: ${error.message}`;
  $("alert").hidden = error === null;
}

/** Asks why, with one event more or less if there is a change, and shows the answer. */
async function ask(change = null, focus = null) {
  running?.abort();
  const own = new AbortController();
  running = own;
  $("results").setAttribute("aria-busy", "true");
  $("status").textContent = "Asking the models …";
  try {
    const { explanation } = await fetchJson("/explain", { ...state, change }, own.signal);
    if (running !== own) return;
    if (change !== null) {
      before.push(structuredClone(state));
      if (change.add) state.history.push(change.add);
      else state.removed.push(change.remove);
    }
    alertOf(null);
    showAll(explanation, change);
    if (focus !== null) $(focus).focus();
  } catch (error) {
    if (running !== own) return; // a later question has taken its place
    $("status").textContent = "";
    alertOf(error);
  } finally {
    if (running === own) {
      running = null;
      $("results").setAttribute("aria-busy", "false");
    }
  }
}

function begin(user) {
  Object.assign(state, { user, history: [], removed: [], target: null });
  before.length = 0;
  ask();
}

// ---- what is shown

function events(count) {
  if (count === 0) return "no event";
  return count === 1 ? "1 event" : `${count} events`;
}

function showAll(explanation, change) {
  $("results").hidden = false;
  showChange(explanation);
  showSteps(explanation);
  showHistory(explanation);
  showRetrieved(explanation);
  showPrompts(explanation);
  showGate(explanation);
  const who = explanation.user === null ? "nobody in particular" : `user ${explanation.user}`;
  const known = explanation.user === null || explanation.is_known ? "" : ", whom the log does not know";
  const list = explanation.steps.at(-1).items;
  const first = list.length ? ` The first is ${named(list[0])}.` : "";
  $("status").textContent = `${list.length} items for ${who}${known}, from ${events(explanation.length)}.${first}`;
}

function showChange({ effect, steps, gate: now }) {
  $("changes").hidden = before.length === 0;
  show("moves");
  if (effect === null) {
    $("change-words").textContent = "You have changed this history.";
    return;
  }
  const event = effect.event;
  const added = state.history.length > (before.at(-1)?.history.length ?? 0);
  const stayed = effect.moves.filter((move) => move.before === move.after).length;
  const left = effect.moves.filter((move) => move.after === null).length;
  const what = event === null ? "The event was not read" : `${added ? "With" : "Without"} ${named(event)} (${opinion(event)})`;
  const gate = effect.gate_before;
  $("change-words").textContent =
    `${what}: of ${steps.at(-1).items.length} items ${stayed || "none"} keep their places, and ${left || "none"} leave the list for others.` +
    (gate && now ? ` The gate’s distance from the mean was ${short(gate.distance)}, and is ${short(now.distance)}.` : "");
  show("moves", table("The list before and now", ["title", "#before", "#now", "change"], effect.moves.map((move) =>
    [named(move), move.before ?? "–", move.after ?? "–", moveWords(move.before, move.after)])));
}

function moveWords(from, to) {
  if (from === null) return element("span", { class: "up" }, "new");
  if (to === null) return element("span", { class: "down" }, "leaves");
  if (from === to) return "";
  const words = element("span", { class: "unseen" }, from > to ? "up " : "down ");
  const arrow = element("span", { "aria-hidden": "true" }, from > to ? "▲ " : "▼ ");
  return element("span", { class: from > to ? "move up" : "move down" }, words, arrow, String(Math.abs(from - to)));
}

function showSteps({ steps, source, target }) {
  $("steps-words").textContent = source === "popularity"
    ? "Nothing is known, so the most popular items are recommended."
    : "Each step orders the head of the list before it anew, by the joined score of all steps so far; beside it stands the " +
      "step’s own score. Choose a title to see what was retrieved for it.";
  show("steps", ...steps.map((step, place) => {
    const last = place === steps.length - 1;
    const names = Object.keys(step.items[0]?.steps ?? {});
    const shown = names.length ? [names.at(-1)] : [];
    const headings = ["#", "title", ...(place ? ["moved"] : []), ...shown.map((name) => `#${name}`), ...(place ? ["#joined"] : [])];
    const lines = step.items.map((item) => {
      const title = element("button", { type: "button", class: "title", "aria-pressed": String(item.item === target) }, named(item));
      title.addEventListener("click", () => { state.target = item.item; ask(null, "retrieved-heading"); });
      return [
        element("td", { class: "n" }, String(item.rank)), element("td", {}, title),
        ...(place ? [element("td", {}, item.before === null ? "" : moveWords(item.before, item.rank))] : []),
        ...shown.map((name) => short(item.steps[name])), ...(place ? [short(item.score)] : []),
      ];
    });
    headings[0] = "#rank";
    const weights = step.weights === null ? "" :
      `; joined by ${Object.entries(step.weights).map(([name, weight]) => `${weight.toFixed(2)} ${name}`).join(" + ")}`;
    const words = `${place ? "scored the first" : "handed on"} ${step.scored}${weights}`;
    return element("div", {}, table(`${place + 1}. ${step.name}${last ? ": what is recommended" : ""}`, headings, lines, words));
  }));
}

function showHistory({ history, length, recent, retrieved, user }) {
  const isRecent = new Set(recent);
  const similarity = new Map((retrieved ?? []).map((event) => [event.place, event.similarity]));
  const line = (event) => {
    const button = element("button", { type: "button", "aria-label": `Remove ${named(event)}` }, "Remove");
    button.addEventListener("click", () => ask({ remove: event.place }, "changes-heading"));
    const facts = element("span", { class: "small" }, [opinion(event), date(event.second)].filter(Boolean).join(", "), " ",
      isRecent.has(event.place) ? element("span", { class: "mark" }, "short history") : null, " ",
      similarity.has(event.place) ? element("span", { class: "mark" }, `retrieved, ${similarity.get(event.place).toFixed(2)}`) : null);
    return [element("th", { scope: "row" }, named(event), facts), element("td", { class: "n" }, button)];
  };
  const newest = [...history].reverse();
  const headings = ["event", "#change"];
  const first = newest.slice(0, 12);
  const rest = newest.slice(12);
  const hidden = length - history.length;
  $("history-words").textContent = length === 0
    ? (user === null ? "Nothing yet: add an event above." : "Nothing is known of this user.")
    : `${events(length)}, the latest first; the last ${recent.length} are the short history.` + (hidden ? ` The oldest ${hidden} are not shown.` : "");
  const parts = first.length ? [table("The latest events", headings, first.map(line))] : [];
  if (rest.length) {
    parts.push(element("details", {}, element("summary", {}, `${rest.length} earlier events`), table("Earlier events", headings, rest.map(line))));
  }
  show("history", ...parts);
}

function showRetrieved({ retrieved, target, target_title: title, steps }) {
  const name = title ?? `item ${target}`;
  if (retrieved === null) {
    $("retrieved-words").textContent = "No step of this cascade retrieves events.";
    show("retrieved");
    return;
  }
  $("retrieved-words").textContent = retrieved.length
    ? `The events of the history that are most like ${name}, by cosine.`
    : "There is no event that could be retrieved.";
  if (!retrieved.length) { show("retrieved"); return; }
  show("retrieved", table(`Nearest to ${name}`, ["title", "#cosine", "opinion"], retrieved.map((event) =>
    [element("th", { scope: "row" }, named(event)), short(event.similarity), opinion(event)])));
}

function showPrompts({ prompts }) {
  $("prompts-section").hidden = prompts.length === 0;
  show("prompts", ...prompts.map((prompt) => {
    const uses = prompt.is_of_list ? "orders the list" : "answers how likely a pair is";
    const cut = prompt.is_cut ? "; its oldest events were cut, as it was too long" : "";
    const title = prompt.question === "next title" ? "Which title comes next" : "Yes or no";
    return element("div", {}, element("h3", {}, title), element("p", { class: "quiet" }, `${prompt.tokens} tokens, ${uses}${cut}.`),
      element("pre", { tabindex: "0", "aria-label": `Prompt: ${title}` }, prompt.text));
  }));
}

function showGate({ gate }) {
  $("gate-section").hidden = gate === null;
  if (gate === null) return;
  const most = Math.max(...gate.alpha, ...gate.mean);
  const bar = (value, kind) => {
    const made = element("span", { class: `bar ${kind}`, "aria-hidden": "true" });
    made.style.width = `${(100 * value) / most}%`;
    return made;
  };
  $("gate-words").textContent = `The distance from the mean is ${short(gate.distance)}: 0 is the same mixture, 1 a disjoint one. ` +
    "The upper bar is this user’s weight, the lower one that of the mean.";
  show("gate", table("Weights of the meta-LoRAs", ["#meta-LoRA", "bars", "#weight", "#mean", "#ratio"], gate.alpha.map((value, place) =>
    [String(place + 1), element("td", { class: "bars" }, bar(value, ""), bar(gate.mean[place], "mean")),
      short(value), short(gate.mean[place]), `× ${(value / gate.mean[place]).toFixed(2)}`])));
}

// ---- what is found

async function find() {
  finding?.abort();
  const own = new AbortController();
  finding = own;
  try {
    const { items } = await fetchJson(`/items?query=${encodeURIComponent($("query").value)}`, null, own.signal);
    if (finding !== own) return;
    $("found-status").textContent = items.length === 20 ? "The 20 best known items of many." : `${items.length} ${items.length === 1 ? "item" : "items"} found.`;
    show("found", ...items.map((item) => {
      const button = element("button", { type: "button" }, `Add ${named(item)}`);
      button.addEventListener("click", () => ask({ add: { item: item.item, ...JSON.parse($("opinion").value) } }, "changes-heading"));
      return element("li", {}, button);
    }));
  } catch (error) {
    if (finding === own) alertOf(error);
  }
}

async function start() {
  try {
    const facts = await fetchJson("/page/start", null);
    $("key-form").hidden = true;
    alertOf(null);
    $("about").textContent = `${facts.dataset}, ${facts.cascade}: ${facts.steps.join(" → ")}. Bundle ${facts.bundle}.`;
    show("users", ...facts.users.map((user) => element("option", { value: String(user) })));
    const ratings = [...facts.ratings].reverse();
    const choices = ratings.length
      ? ratings.map((rating) => [{ rating }, `rated ${rating}`])
      : [[{ label: 1 }, "liked"], [{ label: 0 }, "not liked"]];
    show("opinion", ...choices.map(([value, words]) => element("option", { value: JSON.stringify(value) }, words)));
    find();
    if (facts.users.length) {
      $("user").value = String(facts.users[0]);
      begin(facts.users[0]);
    } else {
      begin(null);
    }
  } catch (error) {
    alertOf(error);
    if (error.isEarly) setTimeout(start, 1500); // its models are being loaded
  }
}

$("who").addEventListener("submit", (event) => { event.preventDefault(); begin($("user").value.trim()); });
$("nobody").addEventListener("click", () => { $("user").value = ""; begin(null); $("query").focus(); });
$("undo").addEventListener("click", () => {
  Object.assign(state, before.pop());
  ask(null, before.length ? "changes-heading" : "results");
});
$("find").addEventListener("submit", (event) => { event.preventDefault(); find(); });
let timer = null;
$("query").addEventListener("input", () => { clearTimeout(timer); timer = setTimeout(find, 200); });
$("key-form").addEventListener("submit", (event) => { event.preventDefault(); key = $("key").value; start(); });
start();
