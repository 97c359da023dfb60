/* Stand-ins for the C symbols that the TensorRT bindings take from three native libraries.
   Compiled once for each library with -DNVINFER, -DNVPLUGIN or -DNVONNX. Every factory returns
   NULL: the bindings can be imported and looked at, and nothing can be built or run. */
#include <stddef.h>
#include <stdint.h>

#ifdef NVINFER
void *createInferBuilder_INTERNAL(void *logger, int32_t version) { return NULL; }
void *createInferRefitter_INTERNAL(void *engine, void *logger, int32_t version) { return NULL; }
void *createInferRuntime_INTERNAL(void *logger, int32_t version) { return NULL; }
void *getBuilderPluginRegistry(int32_t capability) { return NULL; }
void *getPluginRegistry(void) { return NULL; }
int32_t getInferLibVersion(void) { return 0; }
#endif

#ifdef NVPLUGIN
_Bool initLibNvInferPlugins(void *logger, char const *name_space) { return 1; }
#endif

#ifdef NVONNX
void *createNvOnnxParser_INTERNAL(void *network, void *logger, int version) { return NULL; }
void *createNvOnnxParserRefitter_INTERNAL(void *refitter, void *logger, int version) { return NULL; }
int getNvOnnxParserVersion(void) { return 0; }
#endif
