package hooks

import mqtt "github.com/mochi-mqtt/server/v2"

// Mochi is the embedded server.
func (s *Server) Mochi() *mqtt.Server { return s.mochi }
