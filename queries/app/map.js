// Points on a canvas: a class or a share has a colour, the mouse shows a label, a drawn rectangle chooses points.
const COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999933",
  "#882255", "#44AA99", "#AA4499", "#117733", "#661100", "#6699CC", "#888888", "#DDCC77"];
const VIRIDIS = [[68, 1, 84], [59, 82, 139], [33, 145, 140], [94, 201, 98], [253, 231, 37]];
const WIDTH = 760, HEIGHT = 520, PAD = 34;

function viridis(share) {
  const at = Math.min(0.9999, Math.max(0, share)) * (VIRIDIS.length - 1), i = Math.floor(at), rest = at - i;
  return `rgb(${VIRIDIS[i].map((v, k) => Math.round(v + rest * (VIRIDIS[i + 1][k] - v))).join(",")})`;
}

function render({ model, el }) {
  const box = document.createElement("div");
  box.className = "map";
  box.style.cssText = "display:flex;gap:16px;background:#fff;color:#1a1a1a;font:13px system-ui,sans-serif;flex-wrap:wrap";
  const canvas = document.createElement("canvas");
  const dense = window.devicePixelRatio || 1;
  canvas.width = WIDTH * dense;
  canvas.height = HEIGHT * dense;
  canvas.style.cssText = `width:${WIDTH}px;height:${HEIGHT}px;cursor:crosshair;touch-action:none`;
  const side = document.createElement("div"), said = document.createElement("div"), legend = document.createElement("div");
  side.style.cssText = "width:190px";
  said.style.cssText = "min-height:5em;white-space:pre-wrap;margin-top:10px";
  side.append(legend, said);
  box.append(canvas, side);
  el.append(box);
  let points = new Float32Array(0), placed = [], from = null, to = null;
  const numeric = () => !model.get("classes").length;
  const colour = (c) => (Number.isNaN(c) ? "#ccc" : numeric() ? viridis(c) : COLOURS[c % COLOURS.length]);

  const load = () => {
    const view = model.get("points");
    const bytes = view && view.byteLength ? view.buffer.slice(view.byteOffset, view.byteOffset + view.byteLength) : new ArrayBuffer(0);
    points = new Float32Array(bytes);
    const n = points.length / 3, xs = [], ys = [];
    for (let i = 0; i < n; i++) { xs.push(points[3 * i]); ys.push(points[3 * i + 1]); }
    const low = (v) => v.reduce((a, b) => Math.min(a, b), Infinity), high = (v) => v.reduce((a, b) => Math.max(a, b), -Infinity);
    const [x0, x1, y0, y1] = [low(xs), high(xs), low(ys), high(ys)];
    placed = xs.map((x, i) => [PAD + (x - x0) / (x1 - x0 || 1) * (WIDTH - 2 * PAD),
      HEIGHT - PAD - (ys[i] - y0) / (y1 - y0 || 1) * (HEIGHT - 2 * PAD)]);
    from = to = null;
    said.textContent = n ? "Draw a rectangle to choose points." : "";
    draw();
  };
  const draw = () => {
    const pen = canvas.getContext("2d");
    pen.setTransform(dense, 0, 0, dense, 0, 0);
    pen.fillStyle = "#fff";
    pen.fillRect(0, 0, WIDTH, HEIGHT);
    pen.strokeStyle = "#ccc";
    pen.strokeRect(PAD - 12, PAD - 12, WIDTH - 2 * PAD + 24, HEIGHT - 2 * PAD + 24);
    pen.globalAlpha = placed.length > 4000 ? 0.55 : 0.8;
    const size = placed.length > 4000 ? 2 : 3;
    placed.forEach(([x, y], i) => {
      pen.fillStyle = colour(points[3 * i + 2]);
      pen.beginPath();
      pen.arc(x, y, size, 0, 7);
      pen.fill();
    });
    pen.globalAlpha = 1;
    pen.fillStyle = "#1a1a1a";
    pen.font = "12px system-ui, sans-serif";
    const [across, up] = model.get("axes");
    pen.textAlign = "center";
    pen.fillText(across || "", WIDTH / 2, HEIGHT - 6);
    pen.save();
    pen.translate(12, HEIGHT / 2);
    pen.rotate(-Math.PI / 2);
    pen.fillText(up || "", 0, 0);
    pen.restore();
    if (from && to) {
      pen.strokeStyle = "#D55E00";
      pen.lineWidth = 2;
      pen.strokeRect(from[0], from[1], to[0] - from[0], to[1] - from[1]);
      pen.lineWidth = 1;
    }
    key();
  };
  const key = () => {
    legend.replaceChildren();
    const title = document.createElement("b");
    title.textContent = model.get("colour");
    legend.append(title);
    if (numeric()) {
      const bar = document.createElement("div"), ends = document.createElement("div");
      bar.style.cssText = `height:12px;background:linear-gradient(90deg,${VIRIDIS.map((v) => `rgb(${v})`).join(",")})`;
      ends.style.cssText = "display:flex;justify-content:space-between";
      for (const end of model.get("ends")) { const text = document.createElement("span"); text.textContent = end; ends.append(text); }
      if (model.get("ends").length) legend.append(bar, ends);
      return;
    }
    model.get("classes").forEach((name, i) => {
      const row = document.createElement("div"), dot = document.createElement("span");
      dot.style.cssText = `display:inline-block;width:10px;height:10px;border-radius:5px;margin-right:6px;background:${colour(i)}`;
      row.append(dot, name);
      legend.append(row);
    });
  };
  const where = (event) => { const r = canvas.getBoundingClientRect(); return [event.clientX - r.left, event.clientY - r.top]; };
  canvas.addEventListener("pointerdown", (event) => { from = where(event); to = null; canvas.setPointerCapture(event.pointerId); });
  canvas.addEventListener("pointermove", (event) => {
    const [x, y] = where(event);
    if (from && event.buttons) { to = [x, y]; draw(); return; }
    let best = -1, least = 64;
    placed.forEach(([px, py], i) => { const d = (px - x) ** 2 + (py - y) ** 2; if (d < least) { least = d; best = i; } });
    if (best >= 0) said.textContent = model.get("labels")[best];
  });
  canvas.addEventListener("pointerup", (event) => {
    if (!from || !to) { from = null; return; }
    to = where(event);
    const [x0, x1] = [from[0], to[0]].sort((a, b) => a - b), [y0, y1] = [from[1], to[1]].sort((a, b) => a - b);
    const inside = [];
    placed.forEach(([x, y], i) => { if (x >= x0 && x <= x1 && y >= y0 && y <= y1) inside.push(i); });
    said.textContent = `${inside.length} points chosen.`;
    draw();
    model.set("brushed", { of: model.get("key"), at: inside });
    model.save_changes();
  });
  model.on("change:points", load);
  load();
  return () => model.off("change:points", load);
}

export default { render };
