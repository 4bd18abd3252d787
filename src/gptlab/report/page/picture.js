// A chart as a PNG file: its drawings and canvas, a title above and the picked arms' names below, on one canvas.

const LOOKS = ["fill", "stroke", "stroke-width", "stroke-dasharray", "stroke-linejoin", "paint-order", "opacity", "visibility",
  "font-family", "font-size", "font-style", "font-weight"];

async function drawnAlone(svg, { width, height }) {  // an image of a drawing, which has no style sheet: looks become attributes
  const copy = svg.cloneNode(true), nodes = copy.querySelectorAll("*");
  for (const [i, node] of [...svg.querySelectorAll("*")].entries()) {
    const style = getComputedStyle(node);
    for (const key of LOOKS) nodes[i].setAttribute(key, style.getPropertyValue(key));
  }
  const image = new Image();
  fill(copy, { width, height });
  image.src = `data:image/svg+xml,${encodeURIComponent(new XMLSerializer().serializeToString(copy))}`;
  await image.decode();
  return image;
}

function flowing(items, width) {  // [[item, width]] from left to right, in rows of 22 pixels
  let x = 0, y = 0;
  return items.map(([item, wide]) => {
    if (x && x + wide > width) [x, y] = [0, y + 22];
    x += wide;
    return { item, x: x - wide, y };
  });
}

async function savePicture(plot, title) {
  const edge = plot.getBoundingClientRect(), style = getComputedStyle(document.documentElement), ratio = 2, pad = 16, head = 40;
  const study = plot.closest(".study").getAttribute("aria-label"), chips = [...plot.closest(".part").querySelectorAll(".legend .picked")];
  const legend = flowing(chips.map((chip) => [chip, textWidth(chip.dataset.arm) + 52]), edge.width);
  const height = head + edge.height + (legend.length ? legend.at(-1).y + 30 : 0) + pad;
  const canvas = h("canvas", { width: Math.round((edge.width + 2 * pad) * ratio), height: Math.round(height * ratio) });
  const pen = canvas.getContext("2d"), ink = style.getPropertyValue("--ink");
  pen.fillStyle = style.getPropertyValue("--card");
  pen.fillRect(0, 0, canvas.width, canvas.height);
  pen.scale(ratio, ratio);
  pen.translate(pad, 0);
  pen.fillStyle = ink;
  pen.font = `600 15px ${family}`;
  pen.fillText(`${study}: ${title}`, 0, 24, edge.width);
  for (const layer of plot.querySelectorAll("svg, canvas")) {
    const at = layer.getBoundingClientRect(), image = layer.matches("canvas") ? layer : await drawnAlone(layer, at);
    pen.drawImage(image, at.left - edge.left, at.top - edge.top + head, at.width, at.height);
  }
  pen.font = `12px ${family}`;
  for (const { item, x, y } of legend) {
    const look = item.querySelector("svg"), top = head + edge.height + y + 10;
    pen.drawImage(await drawnAlone(look, look.getBoundingClientRect()), x, top);
    pen.fillText(item.dataset.arm, x + 32, top + 11);
  }
  canvas.toBlob((file) => saveAs(file, `${study}-${title}.png`.toLowerCase()));
}
