// The page's only NiceGUI component: hands the server's messages to the board.
import { Board } from "wearfleet-board";

export default {
  template: `<div class="wf-host"></div>`,
  props: { title: String, enrolHint: String, palette: Object },
  mounted() {
    this.board = new Board(this.$el, {
      title: this.title,
      enrolHint: this.enrolHint,
      palette: this.palette,
      resync: () => this.$emit("resync"),
    });
  },
  beforeUnmount() {
    this.board.close();
  },
  methods: {
    receive(text) {
      this.board.receive(JSON.parse(text));
    },
  },
};
