// Colours of this pack's wires, so that a graph can be read from afar. The frontend draws types it does not know alike.
import { app } from "../../scripts/app.js";

const COLORS = {
  MEMO_MODEL: "#B39DDB", // as the host's own models
  MEMO_REFERENCE: "#F48FB1",
  MEMO_AUDIO: "#4DD0E1",
  MEMO_EMOTION: "#FFB74D",
  MEMO_MEMORY: "#FF6E6E",
  MEMO_CLIP: "#AED581",
  MEMO_BOX: "#BCAAA4",
};

function paint() {
  Object.assign(app.canvas.default_connection_color_byType, COLORS);
  Object.assign(window.LGraphCanvas.link_type_colors, COLORS);
}

app.registerExtension({
  name: "memo.wires",
  setup: paint,
  afterConfigureGraph: paint, // a palette, loaded after the set-up, clears the colours of types it does not know
});
