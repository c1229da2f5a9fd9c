// What the browser keeps: settings, and each conversation under a name of its own.

import { Figures } from "./sparsity.js";

const SETTINGS = "turbosparse.settings";
const PREFIX = "turbosparse.chat.";
const DEFAULTS = { system: "", temperature: 0.7, top_p: 0.95, max_tokens: "", key: "", theme: "", model: "" };

function read(name) {
  try {
    return JSON.parse(localStorage.getItem(name)) ?? {};
  } catch {
    return {};
  }
}

/** False where the browser has no more room. */
function write(name, value) {
  try {
    localStorage.setItem(name, JSON.stringify(value));
    return true;
  } catch {
    return false;
  }
}

export const settings = { ...DEFAULTS, ...read(SETTINGS) };
export const saveSettings = () => write(SETTINGS, settings);

export const newConversation = () => ({ id: `${Date.now()}`, title: "New chat", updated: Date.now(), messages: [] });

/** All conversations, the latest first. */
export function conversations() {
  return Object.keys(localStorage)
    .filter((name) => name.startsWith(PREFIX))
    .map(read)
    .filter((found) => Array.isArray(found.messages))
    .map(revive)
    .sort((a, b) => b.updated - a.updated);
}

function revive(conversation) {
  for (const message of conversation.messages) if (message.figures) message.figures = new Figures(message.figures);
  return conversation;
}

/** Where there is no room for it, the strips of its older answers are left out. */
export function save(conversation) {
  const name = PREFIX + conversation.id;
  if (write(name, conversation)) return true;
  for (const message of conversation.messages.slice(0, -1)) delete message.figures;
  return write(name, conversation);
}

export const remove = (conversation) => localStorage.removeItem(PREFIX + conversation.id);
