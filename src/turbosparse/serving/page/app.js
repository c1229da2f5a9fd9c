// The page: conversations, their messages, and the answer that is on its way.

import { answer, listModels } from "./api.js";
import { element, render } from "./markdown.js";
import { Figures, Panel } from "./sparsity.js";
import * as store from "./store.js";

const { settings } = store;
const $ = (id) => document.getElementById(id);
const SUGGESTIONS = [
  "Explain why the sky is blue, in three sentences.",
  "Write a Python function that reverses a string.",
  "What is 12 + 7?",
  "Tell me a short story about a lighthouse.",
];
const panel = new Panel();
let chats = store.conversations();
let current = chats[0] ?? store.newConversation();
let running = null; // { chat, message, controller }
let views = new Map(); // the element of each message that is shown

// -- what is shown ---------------------------------------------------------------------------------

function button(label, name, act) {
  const made = element("button", label);
  Object.assign(made, { type: "button", title: name, ariaLabel: name, onclick: act });
  return made;
}

function drawList() {
  const entries = chats.map((chat) => {
    const open = button(chat.title, chat.title, () => show(chat));
    if (chat === current) open.ariaCurrent = "true";
    const remove = button("×", `Delete ${chat.title}`, () => forget(chat));
    remove.className = "icon remove";
    return element("li", open, remove);
  });
  $("conversations").replaceChildren(...entries);
}

function draw() {
  views = new Map(current.messages.map((message) => [message, view(message)]));
  $("messages").replaceChildren(...views.values());
  $("welcome").hidden = current.messages.length > 0;
  document.title = current.messages.length ? `${current.title} – TurboSparse` : "TurboSparse";
  drawList();
  drawSend();
  select(lastAnswer());
  $("scroller").scrollTop = $("scroller").scrollHeight;
}

const lastAnswer = () => current.messages.findLast((message) => message.role === "assistant");

function view(message) {
  const body = element("div");
  body.className = "body";
  const made = element("article", body);
  made.className = message.role;
  if (message.role === "assistant") {
    made.append(element("footer"));
    made.onclick = () => select(message);
  }
  drawMessage(made, message);
  return made;
}

function drawMessage(made, message) {
  const [body, footer] = made.children;
  if (message.role === "user") {
    body.textContent = message.content;
    return;
  }
  const busy = running?.message === message;
  made.classList.toggle("busy", busy);
  render(body, message.content);
  footer.replaceChildren(...(busy ? [] : actions(message)));
}

/** What stands under an answer that has ended. */
function actions(message) {
  const made = [];
  if (message.note) made.push(element("em", message.note));
  if (message.content && navigator.clipboard) made.push(button("Copy", "Copy the answer", (event) => copy(event, message.content)));
  if (message === lastAnswer()) made.push(button("Again", "Write the answer anew", () => regenerate()));
  if (message.figures?.tokens) made.push(element("span", message.figures.words));
  return made;
}

async function copy(event, text) {
  event.stopPropagation();
  await navigator.clipboard.writeText(text);
  const { target } = event, before = target.textContent;
  target.textContent = "Copied";
  setTimeout(() => (target.textContent = before), 1200);
}

/** The panel shows the figures of this answer. */
function select(message) {
  for (const [other, made] of views) made.classList.toggle("selected", other === message);
  panel.show(message?.figures, message?.content);
}

function drawSend() {
  const busy = Boolean(running);
  $("send").textContent = busy ? "■" : "↑";
  $("send").ariaLabel = busy ? "Stop" : "Send";
  $("send").disabled = !busy && !$("input").value.trim();
}

const atEnd = () => $("scroller").scrollHeight - $("scroller").scrollTop - $("scroller").clientHeight < 60;

// -- what is done ----------------------------------------------------------------------------------

function show(chat) {
  current = chat;
  closeDrawers();
  draw();
  if (matchMedia("(min-width: 60rem)").matches) $("input").focus();
}

function forget(chat) {
  if (running?.chat === chat) running.controller.abort();
  store.remove(chat);
  chats = chats.filter((other) => other !== chat);
  if (chat === current) current = chats[0] ?? store.newConversation();
  draw();
}

function send(text) {
  if (running || !text.trim()) return;
  if (!chats.includes(current)) {
    current.title = text.trim().slice(0, 60);
    chats.unshift(current);
  }
  current.messages.push({ role: "user", content: text });
  $("input").value = "";
  fit();
  generate();
}

function regenerate() {
  if (running) return;
  current.messages.pop();
  generate();
}

function request(chat) {
  const { system, temperature, top_p, max_tokens, model } = settings;
  const said = chat.messages.map(({ role, content }) => ({ role, content }));
  const messages = system.trim() ? [{ role: "system", content: system }, ...said] : said;
  return { model, messages, temperature, top_p, ...(max_tokens && { max_tokens }) };
}

async function generate() {
  const chat = current, asked = request(chat), controller = new AbortController();
  const message = { role: "assistant", content: "", figures: new Figures() };
  chat.messages.push(message);
  chat.updated = Date.now();
  running = { chat, message, controller };
  draw();
  store.save(chat);
  try {
    for await (const chunk of answer(asked, settings.key, controller.signal)) take(chunk, chat, message);
  } catch (error) {
    message.note = error.name === "AbortError" ? "Stopped." : error.message;
    if (error.status === 401) openSettings("key");
  }
  running = null;
  if (chats.includes(chat) && !store.save(chat)) message.note = "The browser has no room for more: delete some conversations.";
  if (current === chat) refresh(message);
  drawSend();
}

function take(chunk, chat, message) {
  const [choice] = chunk.choices;
  const piece = choice?.delta.content ?? "";
  message.content += piece;
  if (chunk.turbosparse) message.figures.add(piece, chunk.turbosparse);
  if (choice?.finish_reason === "length") message.note = "Ended at the longest answer that the settings and the context allow.";
  if (chunk.usage) {
    message.figures.prompt = chunk.usage.prompt_tokens;
    message.figures.cached = chunk.usage.prompt_tokens_details.cached_tokens;
  }
  later(chat, message);
}

let planned = false;
let savedAt = 0;

/** Draw with the next frame, and save now and then, so that a reload loses little. */
function later(chat, message) {
  if (planned) return;
  planned = true;
  requestAnimationFrame(() => {
    planned = false;
    if (current === chat) refresh(message);
    if (running && Date.now() - savedAt > 1000) {
      savedAt = Date.now();
      store.save(chat);
    }
  });
}

function refresh(message) {
  const follow = atEnd();
  drawMessage(views.get(message), message);
  if (views.get(message).classList.contains("selected")) panel.show(message.figures, message.content);
  if (follow) $("scroller").scrollTop = $("scroller").scrollHeight;
}

async function findModels() {
  try {
    const names = await listModels(settings.key);
    $("model").replaceChildren(...names.map((name) => element("option", name)));
    if (!names.includes(settings.model)) settings.model = names[0];
    $("model").value = settings.model;
  } catch (error) {
    if (error.status === 401) openSettings("key");
    else $("model").replaceChildren(element("option", error.message));
  }
}

// -- settings and drawers --------------------------------------------------------------------------

const fields = $("settings").querySelector("form").elements;

function openSettings(field = "system") {
  for (const name of ["system", "temperature", "top_p", "max_tokens", "key", "theme"]) fields[name].value = settings[name];
  drawValues();
  if (!$("settings").open) $("settings").showModal();
  fields[field].focus();
}

function drawValues() {
  for (const name of ["temperature", "top_p"]) fields[`${name}-value`].value = Number(fields[name].value).toFixed(2);
}

function changeSetting({ target }) {
  if (!target.name || !target.checkValidity()) return;
  const { name, value } = target;
  settings[name] = ["temperature", "top_p", "max_tokens"].includes(name) && value !== "" ? Number(value) : value;
  store.saveSettings();
  drawValues();
  applyTheme();
}

function toggle(name, open = !document.body.classList.contains(name)) {
  document.body.classList.toggle(name, open);
  $("shade").hidden = !document.body.matches(".sidebar, .panel");
  $(`${name}-open`).ariaExpanded = open;
}

function closeDrawers() {
  toggle("sidebar", false);
  toggle("panel", false);
}

function fit() {
  const input = $("input");
  input.style.height = "auto";
  input.style.height = `${Math.min(input.scrollHeight, 220)}px`;
  drawSend();
}

function onKey(event) {
  const typing = event.target.matches("input, textarea, select");
  if (event.key === "Escape" && !$("settings").open) {
    running?.controller.abort();
    closeDrawers();
  } else if (event.key === "/" && !typing && !event.ctrlKey && !event.metaKey) {
    event.preventDefault();
    $("input").focus();
  } else if (event.key.toLowerCase() === "o" && event.shiftKey && (event.ctrlKey || event.metaKey)) {
    event.preventDefault();
    show(store.newConversation());
  }
}

$("composer").onsubmit = (event) => {
  event.preventDefault();
  if (running) running.controller.abort();
  else send($("input").value);
};
$("input").oninput = fit;
$("input").onkeydown = (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  send($("input").value);
};
$("messages").addEventListener("click", (event) => {
  if (event.target.matches("button.copy")) copy(event, event.target.closest("figure").querySelector("code").textContent);
});
$("scroller").onscroll = () => ($("down").hidden = atEnd());
$("down").onclick = () => ($("scroller").scrollTop = $("scroller").scrollHeight);
$("new").onclick = () => show(store.newConversation());
$("model").onchange = () => {
  settings.model = $("model").value;
  store.saveSettings();
};
$("settings-open").onclick = () => openSettings();
$("settings").oninput = changeSetting;
$("settings").onclose = () => findModels();
$("forget").onclick = () => {
  if (confirm("Delete all conversations?")) for (const chat of [...chats]) forget(chat);
};
$("sidebar-open").onclick = () => toggle("sidebar");
$("panel-open").onclick = () => toggle("panel");
$("panel-close").onclick = closeDrawers;
$("shade").onclick = closeDrawers;
document.addEventListener("keydown", onKey);
$("suggestions").append(...SUGGESTIONS.map((text) => button(text, text, () => send(text))));

draw();
findModels();
