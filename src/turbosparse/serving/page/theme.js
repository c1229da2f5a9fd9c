// Runs before the page is drawn, so that it never flashes in the other colours.
"use strict";

function applyTheme() {
  let theme = "";
  try {
    theme = JSON.parse(localStorage.getItem("turbosparse.settings"))?.theme ?? "";
  } catch {
    // nothing is stored, or storage is off
  }
  document.documentElement.dataset.theme = theme;
}

applyTheme();
