// Paints a mask over a picture: brush, eraser, undo, invert, zoom. White is painted, black is not.

import { announce, dialog, h, icon, iconButton, slider } from "./dom.js";
import { t } from "./i18n.js";

const SIDE = 1024; // longest side of the mask, in pixels
const UNDO = 30;

/**
 * Let the user paint. `picture` is the URL of what lies under the mask (or null for an empty sheet of
 * `width` × `height`), `mask` the URL of an earlier mask. Resolves to a PNG blob, or null when cancelled.
 */
export async function paint({ title, picture, width, height, mask }) {
  const under = picture ? await loaded(picture) : null;
  const shape = under ? [under.naturalWidth, under.naturalHeight] : [width, height];
  const scale = Math.min(4, SIDE / Math.max(...shape));
  const size = shape.map((side) => Math.max(1, Math.round(side * scale)));
  const surface = new Surface(size, mask ? await loaded(mask) : null);
  return new Promise((resolve) => show(title, under, surface, resolve));
}

async function loaded(url) {
  const image = new Image();
  image.src = url;
  await image.decode();
  return image;
}

/** The mask itself, apart from how it is shown: what is painted is opaque, what is not is transparent. */
class Surface {
  constructor([width, height], earlier) {
    this.canvas = h("canvas", { width, height });
    this.context = this.canvas.getContext("2d", { willReadFrequently: true });
    this.past = [];
    this.future = [];
    if (!earlier) return;
    this.context.drawImage(earlier, 0, 0, width, height);
    const image = this.pixels();
    for (let i = 0; i < image.data.length; i += 4) {
      image.data[i + 3] = image.data[i];
      image.data[i] = image.data[i + 1] = image.data[i + 2] = 255;
    }
    this.context.putImageData(image, 0, 0);
  }

  keep() {
    this.past.push(this.pixels());
    if (this.past.length > UNDO) this.past.shift();
    this.future = [];
  }

  pixels() {
    return this.context.getImageData(0, 0, this.canvas.width, this.canvas.height);
  }

  step(from, to) {
    if (!from.length) return;
    to.push(this.pixels());
    this.context.putImageData(from.pop(), 0, 0);
  }

  stroke(points, radius, erase) {
    const { context } = this;
    context.globalCompositeOperation = erase ? "destination-out" : "source-over";
    Object.assign(context, { strokeStyle: "#fff", fillStyle: "#fff", lineWidth: radius * 2, lineCap: "round", lineJoin: "round" });
    context.beginPath();
    if (points.length === 1) {
      context.arc(...points[0], radius, 0, 7);
      context.fill();
      return;
    }
    context.moveTo(...points[0]);
    for (const point of points.slice(1)) context.lineTo(...point);
    context.stroke();
  }

  clear() {
    this.context.clearRect(0, 0, this.canvas.width, this.canvas.height);
  }

  invert() {
    this.context.globalCompositeOperation = "source-out";
    this.context.fillStyle = "#fff";
    this.context.fillRect(0, 0, this.canvas.width, this.canvas.height);
  }

  empty() {
    const { data } = this.pixels();
    for (let i = 3; i < data.length; i += 4) if (data[i] > 127) return false;
    return true;
  }

  /** White on black, as a PNG. */
  blob() {
    const { width, height } = this.canvas;
    const flat = h("canvas", { width, height });
    const context = flat.getContext("2d");
    context.fillRect(0, 0, width, height);
    context.drawImage(this.canvas, 0, 0);
    return new Promise((resolve) => flat.toBlob(resolve, "image/png"));
  }
}

function show(title, under, surface, resolve) {
  const [width, height] = [surface.canvas.width, surface.canvas.height];
  const state = { radius: Math.round(Math.max(width, height) / 16), erase: false, zoom: 1, at: [width / 2, height / 2], painting: null };
  const view = h("canvas", {
    width, height, class: "paper", tabindex: "0", role: "application",
    "aria-label": t("painterHelp"), title: t("painterHelp"),
  });
  const context = view.getContext("2d");

  const fingers = new Map(); // where each pointer is that touches the sheet
  const tint = h("canvas", { width, height }).getContext("2d");
  const note = h("p", { class: "hint" });

  const draw = () => {
    note.textContent = t("painterHint");
    context.clearRect(0, 0, width, height);
    if (under) context.drawImage(under, 0, 0, width, height);
    tint.globalCompositeOperation = "copy";
    tint.drawImage(surface.canvas, 0, 0);
    tint.globalCompositeOperation = "source-in";
    tint.fillStyle = "#e8542a";
    tint.fillRect(0, 0, width, height);
    context.globalAlpha = under ? 0.62 : 0.9;
    context.drawImage(tint.canvas, 0, 0);
    context.globalAlpha = 1;
    context.strokeStyle = "#fff";
    context.lineWidth = Math.max(1, width / 300);
    context.beginPath();
    context.arc(...state.at, state.radius, 0, 7);
    context.stroke();
    context.strokeStyle = "#000";
    context.setLineDash([6, 6]);
    context.stroke();
    context.setLineDash([]);
  };
  const change = (action) => () => { surface.keep(); action(); draw(); };
  const point = (event) => {
    const box = view.getBoundingClientRect();
    return [((event.clientX - box.left) / box.width) * width, ((event.clientY - box.top) / box.height) * height];
  };

  view.addEventListener("pointerdown", (event) => {
    if (event.button > 0) return;
    event.preventDefault();
    view.focus();
    view.setPointerCapture(event.pointerId);
    fingers.set(event.pointerId, [event.clientX, event.clientY]);
    if (fingers.size > 1) { // two fingers move the sheet; what the first one painted meanwhile is taken back
      if (state.painting) undo();
      state.painting = null;
      return;
    }
    surface.keep();
    state.painting = point(event);
    surface.stroke([state.painting], state.radius, state.erase);
    draw();
  });
  view.addEventListener("pointermove", (event) => {
    if (fingers.size > 1) {
      const [x, y] = fingers.get(event.pointerId) ?? [event.clientX, event.clientY];
      fingers.set(event.pointerId, [event.clientX, event.clientY]);
      view.parentElement.scrollBy((x - event.clientX) / fingers.size, (y - event.clientY) / fingers.size);
      return;
    }
    state.at = point(event);
    if (state.painting) {
      surface.stroke([state.painting, state.at], state.radius, state.erase);
      state.painting = state.at;
    }
    draw();
  });
  for (const name of ["pointerup", "pointercancel"]) {
    view.addEventListener(name, (event) => {
      fingers.delete(event.pointerId);
      state.painting = null;
    });
  }

  const size = slider(t("brushSize"), {
    value: state.radius, min: 2, max: Math.round(Math.max(width, height) / 4), step: 1,
    oninput: (value) => { state.radius = value; draw(); },
  });
  const sized = (factor) => {
    const input = size.querySelector("input");
    input.value = String(Math.max(2, Math.round(state.radius * factor)));
    input.dispatchEvent(new Event("input"));
  };
  const zoomed = (factor) => {
    const easel = view.parentElement;
    const middle = [(easel.scrollLeft + easel.clientWidth / 2) / easel.scrollWidth, (easel.scrollTop + easel.clientHeight / 2) / easel.scrollHeight];
    if (state.zoom === 1) state.fitted = view.clientWidth;
    state.zoom = Math.min(8, Math.max(1, state.zoom * factor));
    view.classList.toggle("zoomed", state.zoom > 1);
    view.style.width = state.zoom > 1 ? `${Math.round(state.fitted * state.zoom)}px` : "";
    easel.scrollTo(middle[0] * easel.scrollWidth - easel.clientWidth / 2, middle[1] * easel.scrollHeight - easel.clientHeight / 2);
  };
  const tool = (erase) => {
    state.erase = erase;
    brush.setAttribute("aria-pressed", String(!erase));
    eraser.setAttribute("aria-pressed", String(erase));
  };
  const undo = () => { surface.step(surface.past, surface.future); draw(); };
  const redo = () => { surface.step(surface.future, surface.past); draw(); };
  const brush = iconButton("brush", t("brush"), () => tool(false));
  const eraser = iconButton("eraser", t("eraser"), () => tool(true));
  tool(false);

  view.addEventListener("keydown", (event) => {
    const step = event.shiftKey ? state.radius * 2 : state.radius / 2;
    const moves = { ArrowLeft: [-step, 0], ArrowRight: [step, 0], ArrowUp: [0, -step], ArrowDown: [0, step] };
    const actions = {
      " ": () => { surface.keep(); surface.stroke([state.at], state.radius, state.erase); },
      "[": () => sized(0.8), "]": () => sized(1.25), e: () => tool(!state.erase), i: () => { surface.keep(); surface.invert(); },
      "+": () => zoomed(1.5), "-": () => zoomed(1 / 1.5),
    };
    if ((event.ctrlKey || event.metaKey) && event.key.toLowerCase() === "z") (event.shiftKey ? redo : undo)();
    else if (moves[event.key]) {
      state.at = [Math.min(width, Math.max(0, state.at[0] + moves[event.key][0])), Math.min(height, Math.max(0, state.at[1] + moves[event.key][1]))];
    } else if (actions[event.key] && !event.ctrlKey && !event.metaKey) actions[event.key]();
    else return;
    event.preventDefault();
    draw();
  });

  let saved = null;
  const done = h("button", {
    type: "button", class: "primary",
    onclick: () => {
      if (surface.empty()) { announce(t("maskEmpty")); note.textContent = t("maskEmpty"); return; }
      surface.blob().then((blob) => { saved = blob; box.close(); });
    },
  }, icon("check"), t("useMask"));
  const box = dialog(title, h("div", { class: "painter" },
    h("div", { class: "tools", role: "toolbar", "aria-label": t("tools") }, brush, eraser, size,
      iconButton("undo", t("undo"), undo), iconButton("redo", t("redo"), redo),
      iconButton("invert", t("invert"), change(() => surface.invert())),
      iconButton("trash", t("clear"), change(() => surface.clear())),
      iconButton("zoomout", t("zoomOut"), () => zoomed(1 / 1.5)), iconButton("zoomin", t("zoomIn"), () => zoomed(1.5))),
    h("div", { class: "easel", tabindex: "-1" }, view),
    h("div", { class: "row" }, note, h("span", { class: "grow" }), done)), { wide: true, onclose: () => resolve(saved), leave: () => !surface.past.length || confirm(t("discardSure")) });
  draw();
  view.focus();
}
