// What the user has chosen, as one plain object; how it becomes a request, and comes back out of one.

export const AUTO_SCALE = { withText: 0.6, alone: 1 };
const TAKES = { everything: "linear", style: "style", composition: "layout" };
const DRAFT = "imprompt.draft";
const OWN = new Set(["device", "dtype", "offload", "quantize", "compile", "hashes", "fingerprints", "face_model", "embeddings"]); // the server's affair

const EMPTY = {
  task: "generate", prompt: "", negative: "", references: [], source: null, mask: null, strength: null, control: null,
  base: null, adapter: null, size: null, steps: null, guidance: null, seed: null, count: 1, frames: null, fps: null, extra: {},
};

export const settings = structuredClone(EMPTY);
export const offered = { capabilities: null };
const listeners = new Set();

export const onchange = (listener) => listeners.add(listener);

/** Change some settings and tell everybody. */
export function change(values) {
  Object.assign(settings, values);
  changed();
}

export function changed() {
  try {
    const draft = JSON.stringify(settings);
    sessionStorage.setItem(DRAFT, draft); // the tab's own, which another tab does not change
    localStorage.setItem(DRAFT, draft); // what a new tab begins with
  } catch { /* private windows have no storage */ }
  for (const listener of listeners) listener();
}

export function loadDraft() {
  try {
    Object.assign(settings, JSON.parse(sessionStorage.getItem(DRAFT) ?? localStorage.getItem(DRAFT) ?? "{}"));
  } catch { /* nothing kept */ }
}

export function newReference(picture) {
  return { pictures: [picture], scale: null, take: "everything", start: 0, end: 1, framing: "crop", mask: null, avoid: false, extra: {} };
}

/** Take pictures that are not on the server any more out of the form. */
export function dropPictures(ids) {
  const kept = (picture) => (picture && !ids.includes(picture.id) ? picture : null);
  settings.references = settings.references
    .map((reference) => ({ ...reference, pictures: reference.pictures.filter(kept), mask: kept(reference.mask) }))
    .filter((reference) => reference.pictures.length);
  settings.source = kept(settings.source);
  settings.mask = settings.source && kept(settings.mask);
  if (settings.control && !kept(settings.control.picture)) settings.control = null;
  changed();
}

/** The chosen base; one that a restored picture names and this server has not keeps its name, and is refused by it. */
export const baseRow = () => {
  const { bases, base } = offered.capabilities;
  const name = settings.base ?? base;
  return bases.find((row) => row.name === name) ?? { name, family: null, size: null, multiple: null, profiles: true, offered: false };
};

export const adaptersHere = () => offered.capabilities.adapters.filter((row) => row.family === baseRow().family || row.family === null);
export const faceAdapter = () => adaptersHere().find((row) => row.face && row.offered);
/** What to take from a picture; layer profiles act on UNets alone. */
export const taken = ({ take }) => (baseRow().profiles || take === "face" ? take : "everything");
export const autoScale = () => (settings.prompt.trim() ? AUTO_SCALE.withText : AUTO_SCALE.alone);

function imagePrompt(reference, avoided) {
  const ids = reference.pictures.map((picture) => picture.id);
  const image = { ...reference.extra, image: ids.length === 1 ? ids[0] : ids };
  if (reference.scale !== null) image.scale = reference.scale;
  if (reference.start > 0) image.start = reference.start;
  if (reference.end < 1) image.end = reference.end;
  if (reference.mask) image.mask = reference.mask.id;
  if ((reference.framing ?? "crop") !== "crop") image.framing = reference.framing;
  const take = taken(reference);
  if (take === "face" && faceAdapter()) image.adapter = faceAdapter().name;
  else if (TAKES[take] && take !== "everything") image.profile = TAKES[take];
  if (avoided) image.negative = avoided.pictures[0].id;
  return image;
}

/** The request as the API takes it. Throws the name of a message when something is missing. */
export function toRequest() {
  const { task } = settings;
  const followed = settings.references.filter((reference) => !reference.avoid);
  const avoided = settings.references.find((reference) => reference.avoid);
  if (avoided && !followed.length) throw new Error("avoidAlone");
  if ((task === "edit" || task === "inpaint") && !settings.source) throw new Error("sourceNeeded");
  if (task === "inpaint" && !settings.mask) throw new Error("maskNeeded");
  const request = { ...settings.extra, task, base: baseRow().name, count: settings.count };
  for (const name of ["prompt", "negative"]) if (settings[name].trim()) request[name] = settings[name].trim();
  for (const name of ["size", "steps", "guidance", "seed"]) if (settings[name] !== null) request[name] = settings[name];
  request.images = followed.map((reference, place) => imagePrompt(reference, place === 0 ? avoided : null));
  if (settings.adapter && followed.length) request.adapter = settings.adapter;
  if (!followed.length) delete request.scale;
  if (task === "edit" || task === "inpaint") request.image = settings.source.id;
  if (task === "inpaint") request.mask = settings.mask.id;
  if (task === "animate") {
    for (const name of ["frames", "fps"]) if (settings[name] !== null) request[name] = settings[name];
    if (settings.source) request.video = settings.source.id;
  }
  if (settings.strength !== null && settings.source && task !== "generate") request.strength = settings.strength;
  if (settings.control) {
    const { picture, kind, scale, start, end, extra } = settings.control;
    request.controls = [{ ...extra, path: picture.id, kind, scale, start, end }, ...(settings.extra.controls ?? [])];
  }
  if (!request.prompt && !followed.length && !request.controls && !(request.regions ?? []).length && (task === "generate" || (task === "animate" && !request.video))) {
    throw new Error("nothing");
  }
  return request;
}

const stub = (id) => ({ id, url: `/api/v1/pictures/${id}`, thumbnail: `/api/v1/pictures/${id}?thumbnail=true`, frames: 1 });

/** The fields of a record that say something else than their default. */
function told(values, { properties }) {
  return Object.fromEntries(Object.entries(values).filter(([name, value]) =>
    value !== null && !(Array.isArray(value) && !value.length) && value !== properties[name]?.default));
}

function fromImage(image) {
  const { image: named, scale, start, end, mask, profile, negative, adapter, framing, ...extra } = image;
  const take = Object.keys(TAKES).find((key) => TAKES[key] === profile) ?? "everything";
  if (profile && TAKES[take] !== profile) extra.profile = profile;
  const kept = told(extra, offered.capabilities.request.$defs.ImagePrompt);
  const face = adapter && offered.capabilities.adapters.find((row) => row.name === adapter)?.face;
  if (adapter && !face) kept.adapter = adapter;
  const reference = {
    pictures: [named].flat().map(stub), scale: scale ?? null, take: face ? "face" : take, start: start ?? 0, end: end ?? 1, framing: framing ?? "crop",
    mask: mask ? stub(mask) : null, avoid: false, extra: kept,
  };
  return negative ? [reference, { ...newReference(stub(negative)), avoid: true }] : [reference];
}

function fromControl({ path, kind, scale, start, end, ...extra }) {
  const kept = told(extra, offered.capabilities.request.$defs.ControlRef);
  return { picture: stub(path), kind, scale: scale ?? 1, start: start ?? 0, end: end ?? 1, extra: kept };
}

/** The ids of the pictures that a request names, each once. */
export function picturesOf(request) {
  const { images, regions, controls, image, mask, video } = request;
  const shown = (images ?? []).flatMap((entry) => [entry.image, entry.mask, entry.negative].flat());
  const others = [...(regions ?? []).map((region) => region.mask), ...(controls ?? []).map((control) => control.path)];
  return [...new Set([...shown, ...others, image, mask, video].filter(Boolean))];
}

/** Take over a request that a picture carries; pictures in `missing` are left out. */
export function fromRequest(request, missing = []) {
  const here = (id) => id && !missing.includes(id);
  const { task, prompt, negative, images, base, adapter, size, steps, guidance, seed, frames, fps, image, mask, video,
    strength, scale, controls, count: _count, ...rest } = request;
  rest.regions = (rest.regions ?? []).filter((region) => here(region.mask));
  const plain = Object.fromEntries(Object.entries(told(rest, offered.capabilities.request)).filter(([name]) => !OWN.has(name)));
  const references = (images ?? []).map((entry) => ({ ...entry, scale: entry.scale ?? scale ?? null }))
    .map((entry) => ({ ...entry, image: [entry.image].flat().filter(here), mask: here(entry.mask) ? entry.mask : null, negative: here(entry.negative) ? entry.negative : null }))
    .filter((entry) => entry.image.length).flatMap(fromImage);
  const [control, ...moreControls] = (controls ?? []).filter((one) => here(one.path));
  if (moreControls.length) plain.controls = moreControls;
  const defaultAdapter = offered.capabilities.adapters.find((row) => row.default && row.name === adapter);
  Object.assign(settings, structuredClone(EMPTY), {
    task, prompt: prompt ?? "", negative: negative ?? "", references, base, adapter: defaultAdapter ? null : adapter ?? null,
    size: size ?? null, steps: steps ?? null, guidance: guidance ?? null, seed: seed ?? null, frames: frames ?? null,
    fps: fps ?? null, strength: strength ?? null,
    source: here(image) ? stub(image) : here(video) ? stub(video) : null, mask: here(mask) ? stub(mask) : null,
    control: control ? fromControl(control) : null,
    extra: plain,
  });
  changed();
}
