package hooks

import (
	"github.com/throughline-mqtt/throughline/bridge"
	"github.com/throughline-mqtt/throughline/rules"
)

// renderedHeaders are those of a delivery as they are stored.
func renderedHeaders(of []rules.RenderedHeader) []bridge.Header {
	if len(of) == 0 {
		return nil
	}
	headers := make([]bridge.Header, len(of))
	for i, h := range of {
		headers[i] = bridge.Header(h)
	}
	return headers
}
