// Small helpers around the DOM: making elements, icons, toasts and dialogs.

import { t } from "./i18n.js";

/** An element: `h("button", { class: "quiet", onclick }, "Text")`. Nullish children are left out. */
export function h(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name in element && typeof value !== "string") element[name] = value;
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.flat().filter((child) => child !== null && child !== undefined && child !== false));
  return element;
}

export const $ = (id) => document.getElementById(id);

/** Whether the user asked for no motion that is not needed. */
export const calm = () => matchMedia("(prefers-reduced-motion: reduce)").matches;

const CONTROLS = "button, input, textarea, select, summary, a[href]";

/** What tells a control from the others when it is made anew. */
function identity(control) {
  const group = control.type === "radio" ? `${control.closest("[role=radiogroup]")?.getAttribute("aria-label")} ${control.value}` : "";
  return control.id || [control.tagName, control.type, group, control.getAttribute("aria-label") ?? (control.closest("label") ?? control).textContent].join("|");
}

/**
 * Put new children into an element. The control that had the focus keeps it: its successor of the same name, else what
 * stands in its place now, else `next`.
 */
export function refill(element, children, next = element) {
  const held = element.contains(document.activeElement) ? document.activeElement : null;
  const before = held ? [...element.querySelectorAll(CONTROLS)] : [];
  const known = held && identity(held);
  const same = (control) => identity(control) === known;
  const among = before.filter(same).indexOf(held);
  element.replaceChildren(...children);
  if (!held || element.contains(document.activeElement)) return;
  const now = [...element.querySelectorAll(CONTROLS)].filter((control) => !control.disabled);
  const alike = now.filter(same);
  const place = next.tabIndex === -1 && next.hasAttribute("tabindex") ? next : now[Math.min(before.indexOf(held), now.length - 1)];
  (alike[among] ?? alike[0] ?? place ?? next.querySelector(CONTROLS))?.focus();
}

const PATHS = {
  plus: "M12 5v14M5 12h14",
  x: "M6 6l12 12M18 6L6 18",
  upload: "M12 16V5m0 0L7.5 9.5M12 5l4.5 4.5M5 19h14",
  paste: "M9 4h6v3H9zM9 5H6v15h12V5h-3",
  history: "M4 12a8 8 0 1 0 2.5-5.8L4 8.5M4 4v4.5h4.5M12 8v4.5l3 2",
  brush: "M4 20c3 0 4.5-1 4.5-3.5S6.5 13.5 5 15 5 19 4 20zM9 14 18.5 4.5c1-1 2.5.5 1.5 1.5L11 15.5",
  eraser: "M8 20h12M5.5 14.5l8-9c.8-.9 1.8-.9 2.6-.1l3 3c.8.8.8 1.8-.1 2.6L11.500 19H8z",
  undo: "M9 7 4.500 11.500 9 16M5 11.500h9a5 5 0 0 1 0 10h-2",
  redo: "m15 7 4.500 4.500L15 16M19 11.500h-9a5 5 0 0 0 0 10h2",
  invert: "M12 4a8 8 0 1 0 0 16zM12 4a8 8 0 0 1 0 16",
  zoomin: "M11 18a7 7 0 1 0 0-14 7 7 0 0 0 0 14zM16 16l4 4M11 8v6M8 11h6",
  zoomout: "M11 18a7 7 0 1 0 0-14 7 7 0 0 0 0 14zM16 16l4 4M8 11h6",
  dice: "M5 5h14v14H5zM9 9h.01M15 9h.01M12 12h.01M9 15h.01M15 15h.01",
  download: "M12 5v10m0 0 4-4m-4 4-4-4M5 19h14",
  trash: "M5 7h14M10 7V4.500h4V7M7 7l1 13h8l1-13M10.500 11v5M13.500 11v5",
  edit: "M4 20l1-4L16 5l3 3L8 19zM13.500 7.500l3 3",
  compare: "M12 3v18M4 6h6v12H4zM14 6h6v12h-6z",
  restore: "M5 12a7 7 0 1 0 2.200-5.100L5 9M5 4.500V9h4.500",
  sliders: "M5 7h9M18 7h1M5 17h1M10 17h9M16 5v4M8 15v4",
  sun: "M12 16a4 4 0 1 0 0-8 4 4 0 0 0 0 8zM12 3v2M12 19v2M3 12h2M19 12h2M5.600 5.600 7 7M17 17l1.400 1.400M18.400 5.600 17 7M7 17l-1.400 1.400",
  moon: "M19 14.500A7.500 7.500 0 0 1 9.500 5 7.500 7.500 0 1 0 19 14.500z",
  auto: "M12 4a8 8 0 1 0 0 16 8 8 0 0 0 0-16zM12 4v16M12 8h3.500M12 12h4.500M12 16h3.500",
  picture: "M4 5h16v14H4zM4 16l5-5 4 4 3-3 4 4M15.500 9h.01",
  grid: "M4 4h7v7H4zM13 4h7v7h-7zM4 13h7v7H4zM13 13h7v7h-7z",
  film: "M4 5h16v14H4zM8.500 5v14M15.500 5v14M4 9.500h4.500M4 14.500h4.500M15.500 9.500H20M15.500 14.500H20",
  check: "M5 12.500 10 17 19 7",
  model: "M12 3 20 7.500v9L12 21l-8-4.500v-9zM4 7.500l8 4.500 8-4.500M12 12v9",
};

/** An icon; it is decoration, its button says what it does. */
export function icon(name) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  svg.setAttribute("viewBox", "0 0 24 24");
  svg.setAttribute("aria-hidden", "true");
  svg.classList.add("glyph");
  const path = document.createElementNS("http://www.w3.org/2000/svg", "path");
  path.setAttribute("d", PATHS[name]);
  svg.append(path);
  return svg;
}

/** A button with an icon alone; `label` is its name and tooltip. */
export function iconButton(name, label, onclick, properties = {}) {
  const { class: more = "", ...rest } = properties;
  return h("button", { type: "button", class: `quiet icon ${more}`, "aria-label": label, title: label, onclick, ...rest }, icon(name));
}

const LASTS = { info: 5000, error: 12000 };

/** A short message that goes away by itself; one of another kind stays until its element is removed. `name` is its button's. */
export function toast(text, kind = "info", { name = t("close"), onclose } = {}) {
  const note = h("div", { class: `toast ${kind}` }, h("span", {}, text),
    iconButton("x", name, () => { note.remove(); onclose?.(); }));
  $("toasts").append(note);
  if (LASTS[kind]) setTimeout(() => note.remove(), LASTS[kind]);
  return note;
}

/**
 * A modal dialog with a title; `close()` removes it. Focus goes back where it was. `leave` says whether it may be
 * closed without a choice.
 */
export function dialog(title, body, { wide = false, onclose, leave = () => true } = {}) {
  const id = `dialog-${Math.random().toString(36).slice(2)}`;
  const box = h("dialog", { class: wide ? "wide" : "", "aria-labelledby": id },
    h("div", { class: "row head" }, h("h2", { id }, title), h("span", { class: "grow" }),
      iconButton("x", t("close"), () => leave() && box.close())), body);
  box.addEventListener("close", () => { box.remove(); onclose?.(); });
  box.addEventListener("cancel", (event) => { if (!leave()) event.preventDefault(); });
  box.addEventListener("click", (event) => { if (event.target === box && leave()) box.close(); });
  document.body.append(box);
  box.showModal();
  return box;
}

let announced = "";

/** Tell a screen reader, unless it was just told. */
export function announce(text) {
  if (text !== announced) $("status").textContent = announced = text;
}

/** A labelled slider that shows its value; `format` makes the value readable. */
export function slider(label, { value, min, max, step, format = String, oninput, hint }) {
  const output = h("output", {}, format(value));
  const input = h("input", {
    type: "range", min: String(min), max: String(max), step: String(step), value: String(value),
    "aria-label": label, "aria-valuetext": format(value),
    oninput: () => {
      const now = Number(input.value);
      output.textContent = format(now);
      input.setAttribute("aria-valuetext", format(now));
      oninput(now);
    },
  });
  return h("div", { class: "field", title: hint }, h("div", { class: "row" }, h("span", { class: "name" }, label), output), input);
}

/** One of several, as buttons: a radio group that looks like a switch. */
export function choice(label, options, value, onchange) {
  const name = `choice-${Math.random().toString(36).slice(2)}`;
  return h("div", { class: "choice", role: "radiogroup", "aria-label": label }, options.map(({ key, text, disabled, hint }) =>
    h("label", { title: hint, class: disabled ? "disabled" : "" },
      h("input", { type: "radio", name, value: key, checked: key === value, disabled: Boolean(disabled), onchange: () => onchange(key) }),
      h("span", {}, text))));
}
