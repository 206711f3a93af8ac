// A picture; a click on an element with data-at chooses that token.
function render({ model, el }) {
  const box = document.createElement("div");
  box.className = "picture";
  box.style.overflowX = "auto";
  el.append(box);
  const draw = () => { box.innerHTML = model.get("html"); };
  box.addEventListener("click", (event) => {
    const hit = event.target.closest("[data-at]");
    if (!hit) return;
    model.set("at", Number(hit.dataset.at));
    model.set("of", model.get("shown"));
    model.save_changes();
  });
  model.on("change:html", draw);
  draw();
  return () => model.off("change:html", draw);
}

export default { render };
